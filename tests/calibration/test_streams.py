"""Calibration of layers that carry several streams along: Gemma 3n's AltUp and LAuReL, vectors and shared caches."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gemma_deploy.calibration import shards
from gemma_deploy.calibration.executors import Here, open_executor
from gemma_deploy.calibration.layer_weights import loaded
from gemma_deploy.calibration.observers import RangeObserver
from gemma_deploy.calibration.points import input_point
from gemma_deploy.calibration.ranges import run_layers
from gemma_deploy.calibration.segments import Beside, Route, state_columns
from gemma_deploy.calibration.shards import LayerPass, LayerSetting, StackTemplate
from gemma_deploy.calibration.states import joined
from gemma_deploy.calibration.streams import walk
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.quantization.layers import layer_file, quantize_layers
from gemma_deploy.quantization.solver import Settings
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.test_beside import IDS, SEQLEN, Apart, compare_codes
from tests.quantization.test_layers import logits, with_results

LINEARS = re.compile(r"model\.layers\.\d+\..*(_proj|_gate|_projection|linear_left|linear_right)|lm_head")
SETTINGS, RNG = Settings(activations=True), np.random.default_rng(3)
POINTS = (
    *("self_attn.q_proj", "laurel.linear_right", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    *("per_layer_input_gate", "per_layer_projection"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    found = Checkpoint.open(write_tiny_checkpoint(path, "gemma3n_text"))
    assert IDS.max() >= found.config.per_layer.rows  # tokens without a row of the table are among them
    return found


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2 * SEQLEN)


def stock_model(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.inference_mode()
def inputs_of(model):
    """[tokens, channels] of what every linear of a layer reads, and [tokens, streams * hidden] of what layers give."""
    found = {}
    for name, module in model.named_modules():
        if LINEARS.fullmatch(name):
            module.register_forward_pre_hook(
                lambda _, args, name=name: found.setdefault(f"{name}.in", []).append(args[0][0])
            )
        if re.fullmatch(r"model\.layers\.\d+", name):  # streams come first in the stock class
            module.register_forward_hook(
                lambda _, args, out, name=name: found.setdefault(f"{name}.out", []).append(
                    out[:, 0].transpose(0, 1).flatten(1)
                )
            )
    for row in IDS:
        model(torch.from_numpy(row[None]))
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]) for name, seen in found.items()}


@pytest.fixture(scope="module")
def stock(checkpoint):
    return inputs_of(stock_model(checkpoint))


@pytest.mark.parametrize("executor", [Here(1), Apart(1)], ids=["here", "apart"])
def test_ranges_are_those_of_transformers(checkpoint, stock, tmp_path, executor):
    found = run_layers(checkpoint, IDS, scratch=tmp_path, executor=executor)
    assert len(found) == 7 * (len(POINTS) + 1) + 1
    for name, seen in stock.items():
        expected = RangeObserver()
        expected.update(seen)
        mine = found[input_point(name.removesuffix(".in")) if name.endswith(".in") else name]
        assert torch.equal(mine.minimum, expected.minimum), name
        assert torch.equal(mine.maximum, expected.maximum), name
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
def test_a_walk_gives_the_layer_s_bits(checkpoint, stock):
    """From group to group with what waits written down between them, as from the input to the output."""
    for index in (1, 4):  # keys and values of its own; those of layer 2
        layer = LayerPass(StackTemplate(LayerSetting(checkpoint.config, "exact", SEQLEN, checkpoint.path)), index)
        with loaded(layer.module, checkpoint, layer.name), layer.hooked():
            states = stock[f"model.layers.{index - 1}.out"][:SEQLEN].numpy()
            sizes = ((1, SEQLEN, 32), (1, 2, SEQLEN, 32), (1, 2, SEQLEN, 32))
            vectors, *pair = (torch.from_numpy(RNG.standard_normal(size, np.float32)) for size in sizes)
            beside = Beside(vectors, None if index == 1 else tuple(pair))
            whole = {}
            expected = layer.run(states, whole.__setitem__, beside=beside)
            state, at, seen = states, None, {}
            for stop in (*POINTS, None):
                parts = walk(layer, state, Route(at), stop=stop, seen=seen.__setitem__, beside=beside)
                if stop == POINTS[0]:
                    continue  # nothing waits there: the next one begins at the layer's input again
                state, at = joined([part[0].numpy() for part in parts]), stop
                if stop is not None:
                    assert state.shape == (SEQLEN, state_columns(layer.spec, stop))
            assert torch.equal(torch.from_numpy(state)[None], expected)
            assert set(seen) == set(whole) == set(POINTS)
            assert all(torch.equal(seen[point], whole[point]) for point in POINTS)


def quantized(checkpoint, folder, executor=None, **options):
    """The bytes of all layer files; nothing else is left but the states for the table, and the key."""
    quantize_layers(checkpoint, IDS, SETTINGS, folder=folder, key="k", executor=executor, **options)
    files = {file.name: file.read_bytes() for file in sorted(folder.glob("layer-*.safetensors"))}
    assert {file.name for file in folder.iterdir()} - set(files) == {"key.json", "hidden-007.f32"}
    return files


@pytest.mark.slow
def test_workers_and_stops_leave_the_same_bytes(checkpoint, tmp_path):
    class StopError(Exception):
        pass

    def stop(done, total):
        assert total == 7 * 8 * len(IDS)
        if done == 5 * 8 * len(IDS) + 3:
            raise StopError

    whole = quantized(checkpoint, tmp_path / "here", Here(1))
    assert quantized(checkpoint, tmp_path / "threads", Here(2)) == whole
    assert quantized(checkpoint, tmp_path / "apart", Apart(1)) == whole
    with open_executor(tmp_path / "processes" / "shards", processes=2) as executor:
        assert quantized(checkpoint, tmp_path / "processes", executor) == whole
    with pytest.raises(StopError):
        quantized(checkpoint, tmp_path / "stopped", progress=stop)
    assert (tmp_path / "stopped" / "hidden-005.f32").stat().st_size == 4 * IDS.size * 4 * 64
    assert quantized(checkpoint, tmp_path / "stopped") == whole


def test_codes_are_those_of_a_plain_gptq_on_what_transformers_reads(checkpoint, tmp_path):
    """In sharing layers and those they read from: inputs of the stock class whose earlier linears are quantized."""
    settings = Settings(percdamp=0.1, equalize=False, act_order=False)
    quantize_layers(checkpoint, IDS, settings, folder=tmp_path, key="k")
    inputs = inputs_of(with_results(checkpoint, tmp_path))
    own = ("self_attn.q_proj", "laurel.linear_left", "laurel.linear_right", *POINTS[2:])
    for layer, names in {0: own, 3: (*own, "self_attn.v_proj"), 4: own, 6: own}.items():
        found = load_file(layer_file(tmp_path, layer))
        assert (f"model.layers.{layer}.self_attn.k_proj.weight" in found) == (layer < 4)
        for name in names:
            compare_codes(checkpoint, found, f"model.layers.{layer}.{name}", inputs)


@pytest.mark.slow
def test_factors_are_undone_by_what_they_were_folded_into(checkpoint, tmp_path):
    records = quantize_layers(checkpoint, IDS, Settings(percdamp=0.1), folder=tmp_path, key="k")
    for record in records:
        groups = {name: group["largest_factor"] for name, group in record["groups"].items()}
        assert max(groups["mlp.gate_proj"], groups["mlp.down_proj"]) > 1.1
        # LAuReL adds what attention reads to the stream, and no norm stands before or behind the others.
        assert {factor for name, factor in groups.items() if not name.startswith("mlp.")} == {1}
    before, after = logits(stock_model(checkpoint)), logits(with_results(checkpoint, tmp_path))
    assert (before.exp() * (before - after)).sum(-1).mean() < 5e-4


@pytest.mark.slow
def test_low_rank_keeps_8_bits_and_whole_rows(checkpoint, tmp_path):
    settings = Settings(bits=4, groupsize=32, kept_w8=("v_proj",))
    quantize_layers(checkpoint, IDS, settings, folder=tmp_path, key="k")
    found = load_file(layer_file(tmp_path, 1))
    most = {name: int(value.abs().max()) for name, value in found.items() if value.dtype == torch.int8}
    wide = {name.split(".")[-2] for name, code in most.items() if code > 7}
    assert wide == {"v_proj", "linear_left", "linear_right"}
    shapes = [tuple(found[f"model.layers.1.laurel.linear_{side}.scale"].shape) for side in ("left", "right")]
    assert shapes == [(16, 1), (64, 1)]
