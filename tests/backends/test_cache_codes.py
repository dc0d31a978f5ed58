"""`+kv8` in ONNX Runtime: what transformers computes with caches that are rounded with the same steps, and the gate."""

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends.onnxruntime import cache_proof
from gemma_deploy.backends.onnxruntime import exact as exactness
from gemma_deploy.backends.onnxruntime.cache_codes import float_caches
from gemma_deploy.backends.onnxruntime.cache_proof import cache_lines, wrong_codes
from gemma_deploy.backends.onnxruntime.in_place import OrtModel, OrtSequence
from gemma_deploy.backends.onnxruntime.window import windows_of
from gemma_deploy.calibration.points import cache_scale_names
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.runtime import Tokenizer
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.testing import TINY_PER_LAYER
from tests.backends.make import open_session
from tests.runtime.make import compile_tiny

TOKENS = [2, *map(int, np.random.default_rng(3).integers(3, 500, 43))]  # five windows of 8
PARTS = ("key", "value")
CLOSE = 1e-5  # relative; the most was 2e-6
# Two geometries, K = V, soft caps, an odd layer behind the last pattern; sharing layers.
KINDS = {
    "gemma": {"num_hidden_layers": 2},
    "gemma2": {"num_hidden_layers": 3},
    "gemma3_text": {"num_hidden_layers": 4, "sliding_window_pattern": 3},
    "gemma4_text": {"num_hidden_layers": 3},
    "shared": TINY_PER_LAYER,
}
WINDOWED = [kind for kind in KINDS if kind != "gemma"]


@pytest.fixture(scope="module")
def compiled(once):
    """(generation, caches) -> artifact, checkpoint; compiled without its gate."""

    def get(kind, cache="full", scheme="w8a16+kv8"):
        backend = {"type": "onnxruntime", "dtype": "int8", "compile": {"cache": cache}}
        recipe = {"frontend": {"quantize": {"type": scheme}}, "dataset": {"name": "c4:4", "seqlen": 64}}
        name = "gemma4_text" if kind == "shared" else kind
        made = once(
            f"cache-codes-{kind}-{cache}-{scheme}",
            lambda root: compile_tiny(root, name, backend, recipe=recipe, **KINDS[kind]),
        )
        return made / "workspace" / "tiny", Checkpoint.open(made / "checkpoint")

    return get


class RoundedCache(DynamicCache):
    """Gives back the nearest codes times their steps, of every token, new ones too.

    Args:
        steps: layer -> [Hk, 1, D] of keys and of values.
        written: layer -> [1, Hk, T, D] likewise: which of two codes a value has that is within 1e-3 of their middle.
    """

    def __init__(self, steps, written):
        super().__init__()
        self.steps, self.written = steps, written

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        rounded = []
        for part, states in enumerate((key_states, value_states)):
            step, written = self.steps[layer_idx][part], self.written[layer_idx][part]
            exact = states / step
            near = (exact - exact.floor() - 0.5).abs() < 1e-3
            codes = torch.where(near & ((exact - written).abs() < 0.501), written, exact.round())
            rounded.append(codes.clamp(-128, 127) * step)
        return super().update(*rounded, layer_idx, *args, **kwargs)


def model_of(artifact, checkpoint):
    """transformers' class with the artifact's weights, and the steps of each layer's cache."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    stored = ArtifactWeights(checkpoint.config, artifact, Manifest.of(manifest))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, attn_implementation="eager", dtype=torch.float32)
    for name in stored.tensors:
        values = torch.from_numpy(stored.rows(name, 0, stored.tensors[name].shape[0]))
        found = dict(model.named_parameters()) | dict(model.named_buffers())
        found[name].data = values.reshape(found[name].shape)
    params, steps = load_file(artifact / "params.safetensors"), {}
    for layer in checkpoint.config.layers:
        names = cache_scale_names(layer)
        if names:
            shape = layer.kv_heads, 1, layer.head_dim
            steps[layer.index] = [torch.from_numpy(params[names[part]].reshape(shape)) for part in PARTS]
    return model.eval(), steps


def expected_logits(model, cache):
    """[tokens, V]."""
    with torch.inference_mode():
        return model(torch.tensor([TOKENS]), past_key_values=cache).logits[0].numpy()


def logits_of(artifact, pieces, capacity, monkeypatch):
    """Logits behind each piece, weights multiplied in float32, and the caches of codes."""
    model = ir.load(artifact / "model.onnx")
    monkeypatch.setattr(exactness, "float_caches", lambda model: None)
    exactness.exact(model)
    windows, session = windows_of(model.graph), open_session(model, artifact, optimize=False)
    caches = {
        value.name: np.zeros((1, value.shape[1], capacity * (value.name in windows), value.shape[3]), np.int8)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    at, found = 0, []
    for size in pieces:
        feeds = {"input_ids": np.array([TOKENS[at : at + size]]), "attention_mask": np.ones((1, at + size), np.int64)}
        logits, *present = session.run(None, feeds | caches)
        caches, at = dict(zip(caches, present, strict=True)), at + size
        found.append(logits[0, 0])
    return np.stack(found), caches


@pytest.mark.parametrize(("kind", "cache"), [*((kind, "full") for kind in KINDS), *((k, "window") for k in WINDOWED)])
def test_logits_are_transformers_with_such_a_cache(compiled, kind, cache, monkeypatch):
    artifact, checkpoint = compiled(kind, cache)
    model, steps = model_of(artifact, checkpoint)
    _, caches = logits_of(artifact, (44,), 60, monkeypatch)
    codes = {name: torch.from_numpy(array[:, :, :44].astype(np.float32)) for name, array in caches.items()}
    written = {layer: [codes[f"past_key_values.{layer}.{part}"] for part in PARTS] for layer in steps}
    expected = expected_logits(model, RoundedCache(steps, written))
    size, floats = np.abs(expected).max(), expected_logits(model, DynamicCache())
    for pieces, capacity in (((20, 6, *[1] * 18), 11), ((44,), 8), ((7, 7, 7, 23), 60)):
        found, _ = logits_of(artifact, pieces, capacity, monkeypatch)
        places = np.cumsum(pieces) - 1
        assert np.abs(found - expected[places]).max() < CLOSE * size, pieces
        assert np.abs(floats - expected)[places].max() > 100 * CLOSE * size, "rounding changes nothing here"


@pytest.mark.parametrize("kind", ["gemma2", "shared"])
def test_genai_and_our_engine_give_its_greedy_tokens(compiled, kind):
    """With the kernels that ship; an unmodified genai makes its caches of the type that the graph says."""
    pytest.importorskip("onnxruntime_genai")
    from gemma_deploy.backends.onnxruntime.genai import GenaiModel, GenaiSession

    artifact, _ = compiled(kind)
    sequence = OrtSequence(OrtModel(artifact, Artifact.open(artifact).manifest, 1), 60)
    assert {cache.data_type() for cache in sequence.caches.values()} == {"tensor(int8)"}
    row, own = sequence.read(TOKENS)[-1], []
    for _ in range(12):
        own.append(int(row.argmax()))
        row = sequence.feed([own[-1]])[-1]
    session, stats = GenaiSession(GenaiModel(artifact, 1), Tokenizer(artifact)), GenerationStats()
    list(session.reply(TOKENS, max_new_tokens=12, stats=stats))
    assert stats.tokens == own[: len(stats.tokens)]
    assert len(stats.tokens) == 12 or stats.finish == "stop"


def test_caches_have_a_quarter_of_the_bytes_and_no_scales_beside_them(compiled):
    artifact, checkpoint = compiled("gemma3_text")
    contract = Artifact.open(artifact).manifest.contract
    ports = [port for port in contract.graphs["model"].inputs if port.name.startswith("past_key_values.")]
    assert len(ports) == 2 * checkpoint.config.num_hidden_layers
    assert {port.dtype for port in ports} == {"int8"}
    entry = next(
        one for one in json.loads((artifact / "manifest.json").read_text())["ledger"] if "one step" in one["what"]
    )
    layer = checkpoint.config.layers[0]
    size = 2 * layer.kv_heads * layer.head_dim
    assert f"{size} bytes a token and layer, float32 takes {4 * size}" in entry["where"]


def test_steps_are_the_largest_magnitudes_of_transformers_by_127(compiled):
    from gemma_deploy.calibration.pipeline import Request, make_windows

    artifact, checkpoint = compiled("gemma4_text")
    ids = make_windows(checkpoint, Request("c4:4", None, 4, 64)).ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, attn_implementation="eager", dtype=torch.float32)
    params = load_file(artifact / "params.safetensors")
    largest = {}
    for window in ids:
        cache = DynamicCache()
        with torch.inference_mode():
            model(torch.from_numpy(window[None]), past_key_values=cache)
        for layer in checkpoint.config.layers:
            for part, states in zip(
                PARTS, (cache.layers[layer.index].keys, cache.layers[layer.index].values), strict=True
            ):
                name = cache_scale_names(layer)[part]
                sizes = states[0].abs().amax(1).numpy()
                largest[name] = np.maximum(largest.get(name, 0), sizes)
    for name, sizes in largest.items():
        expected = np.maximum(sizes, 1e-3 * sizes.max(1, keepdims=True)) / 127
        np.testing.assert_allclose(params[name], expected.reshape(-1), rtol=1e-4)  # float32 in another order: 1e-6


def gate(artifact, checkpoint, folder, change):
    """Whether each line of the gate about caches passes, where the graph is changed."""
    shutil.copytree(artifact, folder)
    model = ir.load(artifact / "model.onnx")
    change(model)
    ir.save(model, folder / "model.onnx")
    return [line.passed for line in cache_lines(folder, checkpoint.config, TOKENS)]


def attention(model, place=1):
    """A node that attends."""
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"][place]


def other_steps(model):
    """Of another layer of the same geometry."""
    node = attention(model, 2)
    node.replace_input_with(12, attention(model, 0).inputs[12])


def own_and_values_exchanged(model):
    node = attention(model)
    keys, values = node.inputs[12], node.inputs[13]
    node.replace_input_with(12, values)
    node.replace_input_with(13, keys)


@pytest.mark.parametrize("kind", ["gemma3_text", "shared"])
def test_the_gate_sees_what_is_wrong_with_a_cache(compiled, kind, tmp_path, monkeypatch):
    artifact, checkpoint = compiled(kind, "window")
    assert gate(artifact, checkpoint, tmp_path / "right", lambda model: None) == [True, True, True]
    assert gate(artifact, checkpoint, tmp_path / "steps", other_steps)[0] is False
    assert gate(artifact, checkpoint, tmp_path / "parts", own_and_values_exchanged)[0] is False
    floats = gate(artifact, checkpoint, tmp_path / "floats", float_caches)
    assert floats == [False, False, False]
    with monkeypatch.context() as patch:  # attention that reads keys and values as they were computed
        patch.setattr(cache_proof, "_read", lambda codes, scale: codes[0] * scale[0] * 1.001)
        found = [line.passed for line in cache_lines(artifact, checkpoint.config, TOKENS)]
    assert found == [True, True, False]


def test_codes_are_the_nearest_or_the_last():
    rng = np.random.default_rng(5)
    exact, scale = rng.normal(size=(9, 2, 4)), np.full((1, 2, 1, 4), 0.01, np.float32)
    right = np.clip(np.rint(exact.transpose(1, 0, 2) / 0.01), -128, 127)[None].astype(np.int8)
    assert np.abs(exact).max() > 1.5, "nothing is beyond the last code"
    assert wrong_codes(right, exact, scale) == 0
    floor = np.clip(np.floor(exact.transpose(1, 0, 2) / 0.01), -128, 127)[None].astype(np.int8)
    assert wrong_codes(floor, exact, scale) > 10
    wrapped = np.rint(exact.transpose(1, 0, 2) / 0.01).astype(np.int64).astype(np.int8)[None]
    assert wrong_codes(wrapped, exact, scale) > 0
