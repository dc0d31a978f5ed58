"""The runner gives the stock model's logits far past the window, and never moves or copies its caches."""

import json
import shutil
import tracemalloc

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.backends.tvm_vacc.sessions import open_session
from gemma_deploy.errors import ArtifactError, UsageError
from tests.manifests import plain_manifest

P, C, STEPS, VOCAB = 32, 80, 34, 512
LENGTHS = (32, 13)  # one fills P, one is left-padded; both longer than the window of 8


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(7)
    return [rng.integers(3, VOCAB, n + STEPS).tolist() for n in LENGTHS]


@pytest.fixture
def artifact(artifacts):
    return artifacts("gemma3_text", "fp32")


@pytest.fixture
def copy(artifact, tmp_path):
    """An artifact to damage."""
    return shutil.copytree(artifact, tmp_path / "copy")


def stock_logits(checkpoint, sequences, **changes):
    """[B, 1 + STEPS, V] by transformers' own class, eager attention, each row alone and without padding."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32, **changes
    ).eval()
    with torch.no_grad():
        rows = [model(torch.tensor([s])).logits[0, n - 1 :] for s, n in zip(sequences, LENGTHS, strict=True)]
    return torch.stack(rows).numpy()


def forced(runner, sequences, steps=STEPS):
    """[B, 1 + steps, V]: prefill of the prompts, then the sequences' own tokens."""
    logits = [runner.prefill([s[:n] for s, n in zip(sequences, LENGTHS, strict=True)])]
    logits += [runner.step([s[n + t] for s, n in zip(sequences, LENGTHS, strict=True)]) for t in range(steps)]
    return np.stack(logits, 1)


@pytest.mark.parametrize("mode", ["strict", "fast"])
def test_logits_equal_the_stock_model(artifacts, model_type, mode, sequences):
    artifact = artifacts(model_type, "fp32")
    expected = stock_logits(artifact.parent / "checkpoint", sequences)
    got = forced(StaticRunner(artifact, mode, 1), sequences)
    # The gate of fp32 (docs/proof-and-ledger.md); 1.2e-6 was measured.
    assert np.abs(got - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_strict_bfloat16_weights_lose_nothing_of_a_bfloat16_checkpoint(artifacts, sequences, tmp_path):
    artifact = artifacts("gemma3_text", "bf16")
    expected = stock_logits(artifact.parent / "checkpoint", sequences)
    got = forced(StaticRunner(artifact, "strict", 1), sequences)
    assert np.abs(got - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    open_session(artifact / "iter1.onnx", "strict", 1, dump=tmp_path / "dump.onnx")
    nodes = onnx.load(str(tmp_path / "dump.onnx"), load_external_data=False).graph.node
    # a weight is widened when it is used and never transposed in memory
    made = {name: node.op_type for node in nodes for name in node.output}
    linears = [node for node in nodes if node.op_type == "FusedMatMul"]
    assert [made[node.input[1]] for node in linears] == ["Cast"] * (7 * 7 + 1)


def test_the_window_is_what_the_test_above_would_miss(artifact, sequences):
    checkpoint = artifact.parent / "checkpoint"
    narrow, wide = (stock_logits(checkpoint, sequences, sliding_window=window) for window in (8, 4096))
    assert np.abs(narrow - wide).max(axis=(0, 2)).min() > 1e-2  # at every position


def test_strict_float16_follows_the_stock_model(artifacts, sequences):
    artifact = artifacts("gemma3_text", "fp16")
    runner = StaticRunner(artifact, "strict", 1)
    assert {port.dtype for port in runner.contract.caches} == {"float16"}
    expected = stock_logits(artifact.parent / "checkpoint", sequences)
    got = forced(runner, sequences)
    # float16 keeps 11 bits: 2**-11 per rounding, some hundred of them on the way; 3e-3 was measured.
    assert np.abs(got - expected).max() <= 1e-2 * np.abs(expected).max()


def test_a_row_does_not_see_the_others(artifact, sequences):
    runner = StaticRunner(artifact, "strict", 1)
    both = forced(runner, sequences, 3)
    other = forced(runner, [sequences[0][::-1], sequences[1]], 3)
    np.testing.assert_array_equal(both[1], other[1])
    assert not np.array_equal(both[0], other[0])


def test_a_second_prompt_starts_afresh(artifact, sequences):
    runner = StaticRunner(artifact, "strict", 1)
    first = forced(runner, sequences, 5)
    assert (runner.position, runner.remaining, runner.lengths.tolist()) == (P + 5, C - P - 5, [37, 18])
    forced(runner, [s[::-1] for s in sequences], 9)
    np.testing.assert_array_equal(forced(runner, sequences, 5), first)
    runner.reset()
    assert (runner.position, runner.lengths.tolist()) == (0, [0, 0])


def test_one_prompt_runner_reopens_its_prefill_session(artifact, sequences):
    runner, kept = (StaticRunner(artifact, "strict", 1, one_prompt=one) for one in (True, False))
    for _ in range(2):
        np.testing.assert_array_equal(forced(runner, sequences, 2), forced(kept, sequences, 2))
    assert list(runner.graphs._opened) == ["iter1"]
    assert list(kept.graphs._opened) == ["iter0", "iter1"]


def test_buffers_stay_where_they_are(artifact, sequences):
    runner = StaticRunner(artifact, "strict", 1)
    forced(runner, sequences, 1)
    decoder = runner._decoder
    bound = [output.data_ptr() for output in decoder.binding.get_outputs()]
    written = [decoder.logits, *decoder.presents]
    assert bound == [array.ctypes.data for array in written]
    before = [array.ctypes.data for array in (*runner._caches, *written, decoder.mask, decoder.ids)]
    forced(runner, sequences, 6)
    assert runner._decoder is decoder
    assert [output.data_ptr() for output in decoder.binding.get_outputs()] == bound
    assert [array.ctypes.data for array in (*runner._caches, *written, decoder.mask, decoder.ids)] == before


def test_the_graph_reads_the_cache_where_it_lies(artifact, sequences):
    runner = StaticRunner(artifact, "strict", 1)
    forced(runner, sequences, 2)
    again = runner.step([9, 9])
    runner.position, runner.lengths = runner.position - 1, runner.lengths - 1
    runner._decoder.mask[:, runner.position] = 0
    np.testing.assert_array_equal(runner.step([9, 9]), again)
    runner.position, runner.lengths = runner.position - 1, runner.lengths - 1
    runner._decoder.mask[:, runner.position] = 0
    runner._caches[-1][:, :, runner.position - 1] += 1
    assert np.abs(runner.step([9, 9]) - again).max() > 1e-3


def test_a_step_writes_one_slot_and_allocates_less_than_a_cache(artifact, sequences):
    runner = StaticRunner(artifact, "strict", 1)
    forced(runner, sequences, 1)
    before = [cache.copy() for cache in runner._caches]
    slot = runner.position
    tracemalloc.start()
    try:
        runner.step([5, 6])
        peak = tracemalloc.get_traced_memory()[1]  # NumPy's arrays are counted
    finally:
        tracemalloc.stop()
    assert peak < runner._caches[0].nbytes  # 41 KB; the logits alone are 4 KB
    for old, cache in zip(before, runner._caches, strict=True):
        changed = np.flatnonzero((old != cache).any(axis=(0, 1, 3)))
        assert changed.tolist() == [slot]


def test_inner_values_of_prefill_and_decode(artifact):
    runner = StaticRunner(artifact, "strict", 1, outputs=["model.layers.3.out", "model.norm.out", "model.no_such.out"])
    runner.prefill([[2, 3], [2]])
    assert {name: value.shape for name, value in runner.values.items()} == {
        "model.layers.3.out": (2, P, 64),
        "model.norm.out": (2, P, 64),
    }
    first = runner.values["model.norm.out"]
    logits = runner.step([4, 4])
    assert {name: value.shape for name, value in runner.values.items()} == {
        "model.layers.3.out": (2, 1, 64),
        "model.norm.out": (2, 1, 64),
    }
    runner.step([5, 5])
    assert not np.array_equal(first, runner.values["model.norm.out"])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[2]], "1 prompts for graphs of batch 2"),
        ([[2], []], "prompts must have 1 to 32 tokens\n  - prompt 1 is empty: it needs at least the BOS token"),
        ([[2] * 33, [2] * 40], "- prompt 0 has 33 tokens, 1 too many\n  - prompt 1 has 40 tokens, 8 too many"),
        ([[2], [2, 512]], "prompt 1: token 512 is not in the vocabulary\n  expected: 0 to 511"),
        ([[-1], [2]], "prompt 0: token -1 is not in the vocabulary"),
    ],
)
def test_prompts_that_do_not_fit(artifact, prompts, message):
    with pytest.raises(UsageError) as caught:
        StaticRunner(artifact, threads=1).prefill(prompts)
    assert message in str(caught.value)


def test_steps_that_do_not_fit(artifact):
    runner = StaticRunner(artifact, threads=1)
    with pytest.raises(UsageError, match="a step needs a prefill before it"):
        runner.step([3, 3])
    runner.prefill([[2], [2, 3]])
    with pytest.raises(UsageError, match="1 tokens for a batch of 2"):
        runner.step([3])
    with pytest.raises(UsageError, match="tokens: token 600 is not in the vocabulary"):
        runner.step([3, 600])
    for _ in range(C - P):
        runner.step([3, 3])
    assert runner.remaining == 0
    with pytest.raises(UsageError, match=r"all 80 cache slots are used \(32 by the prompt with its padding, 48 by"):
        runner.step([3, 3])


def manifest_of(runner):
    """A manifest with the runner's contract, as graph/contract.py writes it."""
    port = lambda p: {"name": p.name, "dtype": p.dtype, "shape": list(p.shape)}  # noqa: E731
    batch, vocab = runner.batch, runner.contract.vocab_size
    return plain_manifest(
        contract={
            "graphs": {
                "iter0": {
                    "inputs": [{"name": "input_ids", "dtype": "int64", "shape": [batch, P]}],
                    "outputs": [{"name": "logits", "dtype": "float32", "shape": [batch, 1, vocab]}],
                },
                "iter1": {
                    "inputs": [
                        {"name": "attention_mask", "dtype": "int64", "shape": [batch, C + 1]},
                        *map(port, runner.contract.caches),
                    ],
                    "outputs": [{"name": "logits", "dtype": "float32", "shape": [batch, 1, vocab]}],
                },
            }
        }
    )


def test_contract_of_the_manifest_is_that_of_the_graphs(copy):
    unfinished = StaticRunner(copy, threads=1)
    manifest = manifest_of(unfinished)
    assert StaticRunner(copy, threads=1, manifest=Manifest.of(manifest)).contract == unfinished.contract
    (copy / "manifest.json").write_text(json.dumps(manifest))
    finished = StaticRunner(copy, threads=1)
    assert finished.contract == unfinished.contract
    assert finished.contract.cache_bytes == 14 * 2 * 2 * C * 32 * 4
    assert finished.manifest == Manifest.of(manifest)


def test_graphs_of_another_artifact_are_refused(copy):
    manifest = manifest_of(StaticRunner(copy, threads=1))
    for port in manifest["contract"]["graphs"]["iter1"]["inputs"][1:]:
        port["dtype"] = "float16"
    runner = StaticRunner(copy, threads=1, manifest=Manifest.of(manifest))
    with pytest.raises(ArtifactError) as caught:
        runner.prefill([[2], [2]])
    assert "graph and manifest disagree" in str(caught.value)
    line = "- present.0.key: float16 [2, 2, 32, 32] in the manifest, float32 [2, 2, 32, 32] in the graph"
    assert line in str(caught.value)
    for port in manifest["contract"]["graphs"]["iter1"]["inputs"][1:]:
        port["shape"][2] = 96
    with pytest.raises(ArtifactError, match="the caches do not fit the attention mask"):
        StaticRunner(copy, threads=1, manifest=Manifest.of(manifest))


def test_directories_that_are_no_artifact(copy, tmp_path):
    with pytest.raises(ArtifactError, match=r"manifest.json and iter0.onnx, iter1.onnx are missing"):
        StaticRunner(tmp_path / "nothing")
    file = copy / "manifest.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "holds a list, expected an object"),
        ("{}", "format_version is None"),
        (json.dumps(plain_manifest()), "has no contract of iter0 and iter1"),
    ):
        file.write_text(text)
        with pytest.raises(ArtifactError, match=message):
            StaticRunner(copy)
    file.unlink()
    (copy / "iter1.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"manifest.json and iter1.onnx are missing"):
        StaticRunner(copy)
