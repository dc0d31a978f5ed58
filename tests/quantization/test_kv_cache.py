"""The int8 cache, compiled as a user would: proven, half the bytes, what transformers computes with such a cache."""

import hashlib
import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends.tvm_vacc.contract import read_contract
from gemma_deploy.backends.tvm_vacc.rounding import cache_codes, rounding_lines
from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.backends.tvm_vacc.segments import StrictSource
from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.cli import main
from gemma_deploy.parity.cases import Case
from gemma_deploy.quantization.cache import cache_factors
from gemma_deploy.testing import TINY_CONFIGS, write_tiny_checkpoint
from gemma_deploy.verifying import verify
from tests.calibration.make import write_tokenizer

LAYERS = {"gemma": 2, "gemma2": 2, "gemma3_text": 3}
RNG = np.random.default_rng(21)


@pytest.fixture(scope="module")
def compiled(once):
    """(generation, type, sections) -> artifact, checkpoint; every combination is compiled once. Read only."""

    def compile_it(model_type, kind, dtype="int8", **sections):
        def make(root):
            changes = {"sliding_window_pattern": 3} if model_type == "gemma3_text" else {}
            layers = LAYERS[model_type]
            path = write_tiny_checkpoint(root / "checkpoint", model_type, num_hidden_layers=layers, **changes)
            write_tokenizer(path)
            others = dict(sections)
            shape = {"input_ids": [[32], [48]], **others.pop("shape", {})}
            quantize = {"type": kind} if kind else None
            frontend = {"checkpoint": str(path), "shape": shape, "quantize": quantize}
            content = {
                "name": "x",
                "frontend": {**frontend, "model_kwargs": others.pop("model_kwargs", {})},
                "dataset": {"name": "c4:4", "seqlen": 64},
                "backend": {"dtype": dtype},
                "parity": {"prompt_tokens": 32, "decode_tokens": 12},
                "workspace": {"path": str(root / "w")},
                **others,
            }
            (root / "r.yaml").write_text(yaml.safe_dump(content))
            assert main(["compile", str(root / "r.yaml")]) == 0

        what = hashlib.sha256(json.dumps(sections).encode()).hexdigest()[:8]
        root = once(f"kv8-{model_type}-{kind}-{dtype}-{what}", make)
        return root / "w" / "x", Checkpoint.open(root / "checkpoint")

    return compile_it


@pytest.mark.parametrize(
    ("model_type", "kind", "dtype", "sections"),
    [
        ("gemma", "w8a16_gptq+kv8", "int8", {}),
        ("gemma2", "w8a16+kv8", "int8", {}),
        ("gemma3_text", "w16kv8", "fp16", {}),
        pytest.param("gemma3_text", "w16kv8", "bf16", {}, marks=pytest.mark.slow),
        pytest.param("gemma3_text", "w8a8+kv8", "int8", {}, marks=pytest.mark.slow),
        ("gemma2", "w8a16_gptq+kv8", "int8", {"model_kwargs": {"tp": 2}}),
        pytest.param("gemma3_text", "w16kv8", "fp16", {"split": {"points": [1]}}, marks=pytest.mark.slow),
        ("gemma3_text", "w4a16_gptq+kv8", "int8", {"shape": {"dynamic": True}}),
    ],
)
def test_compiles_proven_with_half_the_bytes(compiled, model_type, kind, dtype, sections):
    artifact, checkpoint = compiled(model_type, kind, dtype, **sections)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["int8_cache"] is True
    verify(artifact)  # raises where something is wrong
    lines = {line["comparison"]: line for line in manifest["parity"]["lines"]}
    assert lines["codes and scales of the cache = NumPy"]["value"] == 0
    assert lines["caches = codes that attention reads"]["passed"]
    assert any("unrounded" in name for name in lines)
    assert any("int8, with a float16 scale" in entry["what"] for entry in manifest["ledger"])
    config, contract = checkpoint.config, read_contract(artifact, Manifest.of(manifest))
    slots = contract.batch * contract.context * config.num_hidden_layers
    float16 = 2 * 2 * slots * config.num_key_value_heads * config.head_dim
    # Codes take half; a scale of two bytes comes on top of head_dim codes (16 here, 256 in real models: 0.8 %).
    assert contract.cache_bytes == float16 / 2 + float16 / config.head_dim


class RoundedCache(DynamicCache):
    """Gives back what int8 codes keep of every token, new ones too. factors: layer -> part -> [Hk, 1, D]."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        rounded = []
        for part, value in (("k_proj", key_states), ("v_proj", value_states)):
            factor = self.factors[layer_idx][part]
            codes, scale = cache_codes(value.numpy(), factor)
            rounded.append(torch.from_numpy(codes.astype(np.float32) * scale.astype(np.float32) * factor))
        return super().update(*rounded, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("model_type", LAYERS)
def test_it_computes_transformers_with_such_a_cache(compiled, model_type):
    kind = "w8a16+kv8" if model_type != "gemma3_text" else "w8a16_gptq+kv8"
    artifact, checkpoint = compiled(model_type, kind)
    manifest = json.loads((artifact / "manifest.json").read_text())
    stored = ArtifactWeights(checkpoint.config, artifact, Manifest.of(manifest))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, attn_implementation="eager", dtype=torch.float32)
    for name in stored.tensors:
        model.get_parameter(name).data = torch.from_numpy(stored.rows(name, 0, stored.tensors[name].shape[0]))
    config, params = checkpoint.config, load_file(artifact / "params.safetensors")
    heads, dim = config.num_key_value_heads, config.head_dim
    factors = [
        {
            part: params[f"model.layers.{layer}.self_attn.{part}.cache_factor"].reshape(heads, 1, dim)
            for part in ("k_proj", "v_proj")
        }
        for layer in range(config.num_hidden_layers)
    ]
    assert max(float(np.ptp(np.log(one["k_proj"]))) for one in factors) > 0.5
    tokens = [2, *RNG.integers(3, 500, 41).tolist()]  # five windows
    prompt, forced = tuple(tokens[:30]), tuple(tokens[30:])
    strict = StrictSource(artifact)
    state = strict.start(Case("text", (prompt,), (forced,)))
    strict.embed(state)
    strict.layer(0, [state])
    got = state.rows("model.layers.0.out")[0]

    def outputs(cache):
        seen = []
        hook = model.model.layers[0].register_forward_hook(lambda *args: seen.append(args[2]))
        with torch.inference_mode():
            model(torch.tensor([tokens]), past_key_values=cache)
        hook.remove()
        return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).reshape(len(tokens), -1).numpy()

    def agreeing(expected):
        return (np.abs(got - expected).max(1) < 1e-5 * np.abs(expected).max()).mean()

    # A code next to a half may fall on the other side, and every later token attends to it: measured 1.0 here.
    assert agreeing(outputs(RoundedCache(factors))) > 0.9
    assert agreeing(outputs(DynamicCache())) < 0.1, "rounding changes nothing, so nothing was shown"


def test_factors_even_out_channels_within_each_head():
    sizes = torch.from_numpy(10 ** RNG.uniform(-1, 1, (2, 8)))
    sizes[1, 3] = 0
    layer = ModelConfig.from_dict(TINY_CONFIGS["gemma2"], "config.json").layers[3]
    factors = cache_factors(layer, {"key": sizes})["model.layers.3.self_attn.k_proj.cache_factor"].view(2, 8)
    torch.testing.assert_close(factors.log().mean(1), torch.zeros(2), atol=1e-6, rtol=0)
    even = sizes[0] / factors[0]
    assert float(even.max() / even.min()) == pytest.approx(1, rel=1e-5)
    assert float(factors[1, 3] / factors[1].max()) == pytest.approx(1e-3, rel=1e-4)


def test_the_calibrated_factors_are_the_largest_magnitudes_of_transformers(compiled):
    artifact, checkpoint = compiled("gemma2", "w8a16+kv8")
    from gemma_deploy.calibration.pipeline import Request, make_windows

    ids = make_windows(checkpoint, Request("c4:4", None, 4, 64)).ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, attn_implementation="eager", dtype=torch.float32)
    largest = None
    for window in ids:
        cache = DynamicCache()
        with torch.inference_mode():
            model(torch.from_numpy(window[None]), past_key_values=cache)
        here = torch.stack([cache.layers[1].keys[0].abs().amax(1), cache.layers[1].values[0].abs().amax(1)])
        largest = here if largest is None else torch.maximum(largest, here)
    params = load_file(artifact / "params.safetensors")
    for part, sizes in zip(("key", "value"), largest, strict=True):
        (name, expected), *_ = cache_factors(checkpoint.config.layers[1], {part: sizes}).items()
        assert name == f"model.layers.1.self_attn.{part[0]}_proj.cache_factor"
        found = params[name]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)  # float32 sums in another order: 1e-6


def test_a_killed_run_measures_the_cache_once(compiled, tmp_path, monkeypatch, capsys):
    from gemma_deploy import compile as compiler

    artifact, checkpoint = compiled("gemma2", "w8a16+kv8")
    recipe = tmp_path / "r.yaml"
    frontend = {"checkpoint": str(checkpoint.path), "shape": {"input_ids": [[32], [48]]}, "quantize": {}}
    content = {"name": "k", "frontend": frontend, "dataset": {"name": "c4:4", "seqlen": 64}}
    frontend["quantize"] = {"type": "w8a16+kv8"}
    recipe.write_text(yaml.safe_dump({**content, "backend": {"dtype": "int8"}, "workspace": {"path": str(tmp_path)}}))
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "write_parameters", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["compile", str(recipe), "--no-parity"])
    assert (tmp_path / "k.partial" / "quantized" / "cache.safetensors").exists()
    monkeypatch.setattr("gemma_deploy.quantization.cache.observe_cache", lambda *args, **kwargs: 1 / 0)
    assert main(["compile", str(recipe), "--no-parity"]) == 0, capsys.readouterr().err
    name = "model.layers.0.self_attn.v_proj.cache_factor"
    once, again = (load_file(path / "params.safetensors")[name] for path in (artifact, tmp_path / "k"))
    np.testing.assert_array_equal(once, again)
    assert not (tmp_path / "k" / "quantized").exists()


def test_steps_and_fast_sessions(compiled):
    artifact, _ = compiled("gemma3_text", "w8a16_gptq+kv8")
    prompt, steps = [2, *RNG.integers(3, 500, 29).tolist()], RNG.integers(3, 500, 6).tolist()
    found = []
    for mode in ("strict", "fast"):
        runner = StaticRunner(artifact, mode)
        assert {cache.dtype for cache in runner._caches} == {np.dtype(np.int8), np.dtype(np.float16)}
        found.append(np.stack([runner.prefill([prompt]), *(runner.step([token]) for token in steps)]))
    # The whole graphs give what the layers one by one do; the fast kernel rounds activations to int8 in blocks.
    assert 0 < np.abs(found[0] - found[1]).max() < 0.1 * np.abs(found[0]).max()


def broken(artifact, folder, change, graph="iter1"):
    folder.mkdir()
    for file in ("params.safetensors", "iter0.onnx", "iter1.onnx"):
        (folder / file).symlink_to(artifact / file)
    model = ir.load(artifact / f"{graph}.onnx")
    change(model)
    (folder / f"{graph}.onnx").unlink()
    ir.save(model, folder / f"{graph}.onnx")
    manifest = json.loads((artifact / "manifest.json").read_text())
    return {line.comparison.split()[0]: line.passed for line in rounding_lines(folder, Manifest.of(manifest))}


def test_attention_that_reads_the_exact_key_makes_the_gate_red(compiled, tmp_path):
    artifact, _ = compiled("gemma3_text", "w8a16_gptq+kv8")

    def exact(model):
        maker = next(node for node in model.graph if node.op_type == "QuantizeCache")
        read = next(user for user, _ in maker.outputs[0].uses() if user.op_type == "DequantizeCache")
        read.outputs[0].replace_all_uses_with(maker.inputs[0])

    assert broken(artifact, tmp_path / "b", exact) == {"caches": False, "codes": True}
    assert broken(artifact, tmp_path / "c", lambda model: None) == {"caches": True, "codes": True}


@pytest.mark.parametrize(
    ("body", "op", "other"), [("QuantizeCache", "Round", "Ceil"), ("DequantizeCache", "Mul", "Add")]
)
def test_other_bodies_make_the_gate_red(compiled, tmp_path, body, op, other):
    artifact, _ = compiled("gemma3_text", "w8a16_gptq+kv8")

    def change(model):
        function = next(one for one in model.functions.values() if one.name == body)
        next(node for node in function if node.op_type == op).op_type = other

    assert broken(artifact, tmp_path / "b", change, "iter0") == {"caches": True, "codes": False}
