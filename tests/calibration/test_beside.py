"""Calibration of layers that add a vector of each token, or read keys and values of earlier ones: Gemma 4 E2B, E4B.

And EmbeddingGemma 2, whose vectors are made of embeddings alone.
"""

import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gemma_deploy.calibration import beside, shards
from gemma_deploy.calibration.executors import Here, open_executor
from gemma_deploy.calibration.observers import RangeObserver
from gemma_deploy.calibration.points import input_point
from gemma_deploy.calibration.ranges import run_layers
from gemma_deploy.calibration.requirements import beside_bytes
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.quantization.layer_walk import LayerWalk
from gemma_deploy.quantization.layers import layer_file, quantize_layers
from gemma_deploy.quantization.solver import Settings
from gemma_deploy.testing import TINY_PER_LAYER, write_tiny_checkpoint, write_tiny_encoder2
from tests.encoders import stock as stock_encoder
from tests.quantization.test_gptq import energy, numpy_gptq
from tests.quantization.test_layers import logits, with_results

NSAMPLES, SEQLEN = 5, 40  # five windows of 8
IDS = np.random.default_rng(5).integers(3, 500, (NSAMPLES, SEQLEN))
LINEARS = re.compile(r"model\.layers\.\d+\..*(_proj|_gate|_projection)")
SETTINGS = Settings(activations=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    return Checkpoint.open(write_tiny_checkpoint(path, "gemma4_text", **TINY_PER_LAYER))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2 * SEQLEN)


class Apart(Here):
    """Workers that see nothing of this process, as on a cluster: what they get and give is copied."""

    shares = "nothing"

    def map(self, work, layer, items):
        found = super().map(work, layer, (pickle.loads(pickle.dumps(item)) for item in items))
        yield from (pickle.loads(pickle.dumps(result)) for result in found)


@torch.inference_mode()
def inputs_of(model):
    """[tokens, channels] of what every linear of a layer reads, and [tokens, hidden] of what layers give."""
    found = {}
    for name, module in model.named_modules():
        if LINEARS.fullmatch(name):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.setdefault(f"{name}.in", []).append(args[0][0])
            )
        if re.fullmatch(r"model\.layers\.\d+", name):
            module.register_forward_hook(
                lambda _, args, out, name=name: found.setdefault(f"{name}.out", []).append(out[0])
            )
    for row in IDS:
        model(torch.from_numpy(row[None]))
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]) for name, seen in found.items()}


@pytest.fixture(scope="module")
def stock(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    return inputs_of(model.eval())


@pytest.mark.parametrize("executor", [Here(1), Apart(1)], ids=["here", "apart"])
def test_ranges_are_those_of_transformers(checkpoint, stock, tmp_path, executor):
    compare_ranges(checkpoint, stock, tmp_path, executor)


def test_ranges_of_an_encoder_whose_vectors_no_table_has(tmp_path):
    """EmbeddingGemma 2: windows are read in both directions, vectors are made of embeddings."""
    path = write_tiny_encoder2(tmp_path / "checkpoint")
    whole = torch.nn.Module()
    whole.model = stock_encoder(path)
    whole.forward = whole.model.forward
    (tmp_path / "scratch").mkdir()
    compare_ranges(Checkpoint.open(path, encoder=True), inputs_of(whole), tmp_path / "scratch", Here(1))


def compare_ranges(checkpoint, stock, scratch, executor):
    """Those that a pass finds with those of what a model read and gave; nothing is left."""
    found = run_layers(checkpoint, IDS, scratch=scratch, executor=executor)
    assert len(found) == 7 * (6 + 1) + 1
    for name, seen in stock.items():
        expected = RangeObserver()
        expected.update(seen)
        mine = found[input_point(name.removesuffix(".in")) if name.endswith(".in") else name]
        assert torch.equal(mine.minimum, expected.minimum), name
        assert torch.equal(mine.maximum, expected.maximum), name
    assert not list(scratch.iterdir())


def quantized(checkpoint, folder, executor=None, **options):
    """The bytes of all layer files; nothing else is left but the states for the table, and the key."""
    quantize_layers(checkpoint, IDS, SETTINGS, folder=folder, key="k", executor=executor, **options)
    files = {file.name: file.read_bytes() for file in sorted(folder.glob("layer-*.safetensors"))}
    assert {file.name for file in folder.iterdir()} - set(files) == {"key.json", "hidden-007.f32"}
    return files


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 2 * SEQLEN)
        return quantized(checkpoint, tmp_path_factory.mktemp("whole") / "q", Here(1))


@pytest.mark.parametrize("executor", [Here(2), Apart(1)], ids=["threads", "apart"])
def test_other_workers_give_the_same_bytes(checkpoint, whole, tmp_path, executor):
    assert quantized(checkpoint, tmp_path / "q", executor) == whole


@pytest.mark.slow
def test_processes_give_the_same_bytes(checkpoint, whole, tmp_path):
    with open_executor(tmp_path / "q" / "shards", processes=2) as executor:
        assert quantized(checkpoint, tmp_path / "q", executor) == whole


class StopError(Exception):
    """Ends a run somewhere."""


@pytest.mark.parametrize("lost", ["", "shared-002.f32", "vectors.f32", "hidden-005.f32"])
def test_a_stopped_run_goes_on_and_makes_lost_files_again(checkpoint, whole, tmp_path, lost, monkeypatch):
    """In the second of the layers that share, with keys and values of layer 2 and 3 on disk."""

    def stop(done, total):
        if done == 5 * 7 * NSAMPLES + 3:
            raise StopError

    with pytest.raises(StopError):
        quantize_layers(checkpoint, IDS, SETTINGS, folder=tmp_path / "q", key="k", progress=stop)
    assert (tmp_path / "q" / "shared-002.f32").stat().st_size == 4 * IDS.size * 2 * 2 * 32
    if lost:
        (tmp_path / "q" / lost).unlink()
    begun, right = [], LayerWalk.leave
    monkeypatch.setattr(LayerWalk, "leave", lambda self, *args: begun.append(self.layer.index) or right(self, *args))
    assert quantized(checkpoint, tmp_path / "q") == whole
    # Without layer 2's keys and values the run goes on where hidden states are and no layer needs them: at the first.
    assert begun == {"": [5, 6], "vectors.f32": [5, 6]}.get(lost, list(range(7)))


def test_codes_are_those_of_a_plain_gptq_on_what_transformers_reads(checkpoint, tmp_path):
    """In sharing layers and those they read from: inputs of the stock class whose earlier linears are quantized."""
    settings = Settings(percdamp=0.1, equalize=False, act_order=False)
    quantize_layers(checkpoint, IDS, settings, folder=tmp_path, key="k")
    inputs = inputs_of(with_results(checkpoint, tmp_path))
    own = ("self_attn.q_proj", "self_attn.o_proj", "per_layer_input_gate", "per_layer_projection")
    for layer, names in {2: own, 3: (*own, "self_attn.v_proj"), 4: own, 6: (*own, "mlp.gate_proj")}.items():
        found = load_file(layer_file(tmp_path, layer))
        assert (f"model.layers.{layer}.self_attn.k_proj.weight" in found) == (layer < 4)
        for name in names:
            path = f"model.layers.{layer}.{name}"
            assert compare_codes(checkpoint, found, path, inputs) < 0.5, path  # measured 0 to 0.32


def compare_codes(checkpoint, found, path, inputs):
    """Codes of a linear with NumPy's GPTQ in float64, row by row, and what they lose: the share of rows to nearest.

    Args:
        found: results of its layer; inputs: of the stock class, by point.
    """
    x = inputs[f"{path}.in"].double().numpy()
    h, weight = x.T @ x / len(x), checkpoint.rows(f"{path}.weight", 0, found[f"{path}.weight"].shape[0])
    units = np.broadcast_to(found[f"{path}.scale"].numpy()[:, None], weight.shape)
    codes, expected = found[f"{path}.weight"].numpy(), numpy_gptq(weight, h, units, 127, 0.1)
    to_nearest = (codes == np.clip(np.rint(weight / units), -127, 127)).all(1)
    same = (codes == expected).all(1) | to_nearest  # what loses less, row by row
    # float32 against float64: a value next to a half rounds the other way.
    assert same.mean() >= 0.9, path
    lost, least = (energy(weight - some * units, h).sum() for some in (codes, expected))
    assert lost <= 1.005 * least, path
    return to_nearest.mean()


def test_factors_are_undone_by_what_they_were_folded_into(checkpoint, tmp_path):
    records = quantize_layers(checkpoint, IDS, Settings(percdamp=0.1), folder=tmp_path, key="k")
    for record in records:
        groups = {name: group["largest_factor"] for name, group in record["groups"].items()}
        assert max(groups["self_attn.q_proj"], groups["mlp.down_proj"]) > 1.1
        # No norm stands before the stream or behind the values, and gelu lets no factor pass.
        assert {groups[name] for name in ("self_attn.o_proj", "per_layer_input_gate", "per_layer_projection")} == {1}
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    before, after = logits(model.eval()), logits(with_results(checkpoint, tmp_path))
    # Measured: 2e-4, and 0.018 with the norms as they were.
    assert (before.exp() * (before - after)).sum(-1).mean() < 5e-4


def test_what_is_read_besides_is_in_the_estimate(checkpoint):
    tokens, vectors = 3 * 8, 7 * 32
    assert beside_bytes(checkpoint.config, 3, 8) == 4 * tokens * (vectors + 2 * 2 * 32 + 2 * 2 * 64)
    assert beside_bytes(checkpoint.config, 100, 512) == 4 * (512 * vectors + 51200 * (2 * 2 * 32 + 2 * 2 * 64))


def test_a_token_has_one_vector_wherever_it_stands(checkpoint, tmp_path, monkeypatch):
    """Blocks of tokens change nothing."""
    made = []
    for size in (256, 3):
        monkeypatch.setattr(beside, "MADE_TOGETHER", size)
        stack = shards.StackTemplate(shards.LayerSetting(checkpoint.config, "exact", SEQLEN, checkpoint.path)).stack
        held = beside.ReadBeside(checkpoint.config, tmp_path, (NSAMPLES, SEQLEN))
        with torch.inference_mode():
            held.make_vectors(checkpoint, stack, IDS)
        made.append(np.stack([held.vectors(layer, range(1, 3)).read(2) for layer in checkpoint.config.layers]))
    np.testing.assert_allclose(made[0], made[1], rtol=0, atol=2e-6)
