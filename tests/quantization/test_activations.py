"""w8a8: rounding per token, factors that serve it, the linears that are spared, and the artifact that says so."""

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends.tvm_vacc.backend import StaticPair
from gemma_deploy.backends.tvm_vacc.rounding import differing_values, rounded, rounded_linears, rounding_lines
from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.backends.tvm_vacc.segments import StrictSource
from gemma_deploy.calibration.observers import TokenObserver
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import main
from gemma_deploy.parity.cases import Case
from gemma_deploy.quantization.budget import Budget
from gemma_deploy.quantization.equalize import column_factors, token_gains
from gemma_deploy.quantization.mixed_precision import unrounded_inputs
from gemma_deploy.quantization.solver import Settings, round_tokens, solve
from gemma_deploy.testing import TINY_EXPERTS, write_tiny_checkpoint
from tests.calibration.make import write_tokenizer

RNG = np.random.default_rng(11)


def normal(*shape):
    return torch.from_numpy(RNG.standard_normal(shape)).float()


def outlying(tokens, columns):
    """Inputs with a few channels of large magnitude, as those of a Gemma, and a token that outweighs all others."""
    x = normal(tokens, columns) * torch.logspace(-1.5, 1.5, columns)[torch.randperm(columns)]
    x[3] *= 100
    return x


def test_rounding_is_that_of_numpy():
    x = outlying(40, 33)
    x[5] = 0
    np.testing.assert_array_equal(round_tokens(x).numpy(), rounded(x.numpy()))
    assert (x - round_tokens(x)).abs().amax(1).le(x.abs().amax(1) / 254 * 1.00001).all()


def test_factors_minimize_both_noises():
    w, x = normal(40, 16) * torch.logspace(-1, 1, 16), outlying(60, 16)
    gains = token_gains([w], x)
    power = (x.square() * gains[:, None]).mean(0)
    weights, inputs, g = w.double().numpy(), x.double().numpy(), gains.double().numpy()

    def objective(logs):
        s = np.exp(logs)
        of_weights = (np.abs(weights * s).max(1) ** 2).sum() * (power.double().numpy() / s**2).sum()
        return of_weights + (g * np.abs(inputs / s).max(1) ** 2).mean() * ((weights * s) ** 2).sum()

    found = np.log(column_factors([w], power, tokens=x).double().numpy())
    best = objective(found)
    assert best < 0.5 * objective(np.zeros(16))
    assert best < 0.99 * objective(np.log(column_factors([w], power).double().numpy()))
    walk = found.copy()
    for step in (0.3, 0.1, 0.03, 0.01):  # a coordinate search from there finds next to nothing more
        for _ in range(20):
            for column in range(16):
                for change in (step, -step):
                    walk[column] += change
                    if objective(walk) >= objective(found):
                        walk[column] -= change
                    else:
                        found = walk.copy()
    assert objective(found) > 0.9 * best


def test_gains_are_the_inverse_of_the_output():
    w, x = normal(20, 12), outlying(30, 12)
    square = ((x @ w.T) ** 2).sum(1)
    gains = token_gains([w[:5], w[5:]], x)
    assert float(gains.mean()) == pytest.approx(1)
    torch.testing.assert_close(gains * square, (gains * square).mean().expand(30), rtol=1e-4, atol=0)


def test_a_linear_loses_less_with_the_factors_and_the_noise_is_measured():
    w, x = normal(48, 64), outlying(500, 64)
    moments = x.T @ x / len(x)
    found, plain = (
        solve([w], moments.clone(), Settings(activations=True, equalize=equalize), tokens=x).weights[0]
        for equalize in (True, False)
    )
    assert found.activation_noise < 0.3 * plain.activation_noise
    y = x.double() @ plain.dequantized().double().T
    error = (x - round_tokens(x)).double() @ plain.dequantized().double().T
    measured = (error.square().sum(1) / y.square().sum(1)).mean()
    assert plain.activation_noise == pytest.approx(float(measured), rel=1e-3)


@pytest.mark.parametrize(("total", "most"), [(100, 10), (64, 64), (1000, 7), (5, 100)])
def test_the_same_tokens_are_kept_however_they_come(total, most):
    x, once, parts = normal(total, 3), TokenObserver(total, most), TokenObserver(total, most)
    once.add(once.kept(0, x))
    start = 0
    while start < total:
        size = int(RNG.integers(1, 30))
        parts.add(parts.kept(start, x[start : start + size]))
        start += size
    kept = once.take()
    assert torch.equal(kept, parts.take())
    assert 0 < len(kept) <= most
    assert torch.equal(kept, x[:: once.step])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "c"
    write_tiny_checkpoint(path, "gemma3_text", num_hidden_layers=3, sliding_window_pattern=3)
    write_tokenizer(path)
    return Checkpoint.open(path)


def records(config, noisy=()):
    return [
        {
            "layer": f"model.layers.{layer}",
            "tensors": {
                reader: {"activation_noise": dict(noisy).get((layer, group.observed), 1e-6)}
                for group in config.layers[layer].groups
                for reader in group.readers
            },
        }
        for layer in range(3)
    ]


def test_the_noisiest_are_kept_within_the_share(checkpoint):
    config = checkpoint.config
    noisy = {(1, "mlp.down_proj"): 1e-2, (0, "self_attn.q_proj"): 1e-3, (2, "mlp.down_proj"): 5e-4}
    found = records(config, noisy.items())
    assert unrounded_inputs(found, config, Budget(0)) == ()
    everything = unrounded_inputs(found, config, Budget(1))
    attention = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert everything == (*attention, "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj")
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if "_proj" in name}
    down = np.prod(shapes["model.layers.1.mlp.down_proj.weight"]) / sum(np.prod(shape) for shape in shapes.values())
    assert unrounded_inputs(found, config, Budget(1.01 * down)) == ("model.layers.1.mlp.down_proj",)
    assert unrounded_inputs(found, config, Budget(0.99 * down)) == ()

    # those named come first whatever the noise of others, by their own
    def kept(share):
        return unrounded_inputs(found, config, Budget(share, 0.0, "mlp.down_proj"))

    every = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(3))
    assert kept(3.01 * down) == every
    assert kept(2.01 * down) == every[1:]
    room = sum(np.prod(shapes[f"{name}.weight"]) for name in attention) / sum(map(np.prod, shapes.values()))
    assert set(kept(3.001 * down + room)) == {*every, *attention}


def test_of_experts_what_is_inside_stays_and_the_rest_costs_what_a_token_runs_through(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "c", "gemma4_text", num_hidden_layers=3, **TINY_EXPERTS)
    config, up = Checkpoint.open(path).config, "experts.gate_up_proj"
    found = records(config, {(1, "mlp.down_proj"): 1e-2}.items())
    for layer, record in enumerate(found):
        record["tensors"][up] = {"activation_noise": [0.0, 1e-3, 2e-3][layer]}
    inside = tuple(f"model.layers.{layer}.experts.down_proj" for layer in range(3))
    assert unrounded_inputs(found, config, Budget(0)) == inside
    noisy = ("model.layers.1.mlp.down_proj", f"model.layers.1.{up}", f"model.layers.2.{up}")
    assert unrounded_inputs(found, config, Budget(1)) == (*noisy, *inside)
    shapes = {name: tensor.shape for name, tensor in Checkpoint.open(path).tensors.items() if "_proj.weight" in name}
    down, given = np.prod(shapes["model.layers.1.mlp.down_proj.weight"]), 3 * 2 * 96 * 64
    every = sum(np.prod(shape) for shape in shapes.values()) + 3 * given
    for room, kept in ((down + given - 1, noisy[:1]), (down + given + 1, (noisy[0], noisy[2]))):
        assert unrounded_inputs(found, config, Budget(room / every)) == (*kept, *inside)


@pytest.fixture(scope="module")
def artifact(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StaticPair, "unrounded_inputs", Budget(0.1, 0.0))
        (path / "r.yaml").write_text(
            f"name: x\nfrontend:\n  checkpoint: {checkpoint.path}\n  shape: {{input_ids: [[32], [48]]}}\n"
            "  quantize: {type: w8a8, calib_args: {keep_a16: 0.3}}\ndataset: {name: 'c4:4', seqlen: 64}\n"
            f"backend: {{dtype: int8}}\nparity: {{prompt_tokens: 32, decode_tokens: 12}}\nworkspace: {{path: {path}}}\n"
        )
        assert main(["compile", str(path / "r.yaml")]) == 0
    return path / "x"


def test_kept_linears_are_listed_and_read_their_inputs_as_they_are(artifact, checkpoint):
    manifest = json.loads((artifact / "manifest.json").read_text())
    kept = set(manifest["quantization"]["activations"]["kept"])
    every = {name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith("_proj.weight")}
    assert kept
    assert kept < every
    for graph in ("iter0", "iter1"):
        assert rounded_linears(ir.load(artifact / f"{graph}.onnx")) == every - kept
    said = next(entry for entry in manifest["ledger"] if "scale per token" in entry["why"])
    assert all(name in said["why"] for name in kept)
    assert said["effect"]["activation_noise_db"] < -20


def test_the_artifact_computes_transformers_with_rounded_inputs(artifact, checkpoint):
    from transformers import AutoModelForCausalLM

    manifest = json.loads((artifact / "manifest.json").read_text())
    kept, stored = (
        set(manifest["quantization"]["activations"]["kept"]),
        ArtifactWeights(checkpoint.config, artifact, Manifest.of(manifest)),
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, attn_implementation="eager", dtype=torch.float32)
    for name in stored.tensors:
        rows = stored.rows(name, 0, stored.tensors[name].shape[0])
        model.get_parameter(name).data = torch.from_numpy(rows)
    prompt = (2, *RNG.integers(3, 500, 29).tolist())  # four windows
    case, first = Case("text", (prompt,), ((),)), "model.layers.0.out"
    strict = StrictSource(artifact)

    def outputs(round_them):
        hooks = []
        for name, module in model.named_modules():
            if name.startswith("model.layers.0.") and name.endswith("_proj") and name not in kept and round_them:
                transposed = lambda _, args: (torch.from_numpy(rounded(args[0].numpy())),)  # noqa: E731
                hooks.append(module.register_forward_pre_hook(transposed))
        seen = []
        hooks.append(model.model.layers[0].register_forward_hook(lambda *args: seen.append(args[2])))
        with torch.inference_mode():
            model(torch.tensor([prompt]))
        for hook in hooks:
            hook.remove()
        return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).reshape(len(prompt), -1).numpy()

    state = strict.start(case)
    strict.embed(state)
    strict.layer(0, [state])
    got = state.rows(first)[0]

    def agreeing(expected):
        return (np.abs(got - expected).max(1) < 1e-5 * np.abs(expected).max()).mean()

    # A code next to a half may fall on the other side, and every later token attends to it: measured 1.0 here.
    assert agreeing(outputs(True)) > 0.9
    assert agreeing(outputs(False)) == 0, "rounding changes nothing, so nothing was shown"


def test_fast_sessions_run_it(artifact):
    prompt = [list(range(3, 30))]
    strict, fast = (StaticRunner(artifact, mode).prefill(prompt) for mode in ("strict", "fast"))
    assert 0 < np.abs(strict - fast).max() < 0.1 * np.abs(strict).max()


def broken_copy(artifact, folder, change):
    """The graphs of the artifact, changed, beside its own parameters."""
    folder.mkdir()
    (folder / "params.safetensors").symlink_to(artifact / "params.safetensors")
    for name in ("iter0.onnx", "iter1.onnx"):
        model = ir.load(artifact / name)
        change(model)
        ir.save(model, folder / name)
    return json.loads((artifact / "manifest.json").read_text())


def lines_of(artifact, manifest):
    return {line.comparison.split()[0]: line for line in rounding_lines(artifact, Manifest.of(manifest))}


def test_a_linear_that_is_not_rounded_makes_the_gate_red(artifact, tmp_path):
    def forget(model):
        node = next(node for node in model.graph if node.op_type == "QuantizeDequantizePerToken")
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove(node, safe=True)

    manifest = broken_copy(artifact, tmp_path / "broken", forget)
    found = lines_of(tmp_path / "broken", manifest)
    assert not found["linears"].passed
    assert found["linears"].value == 2 * 3  # q, k and v of both graphs
    assert found["rounding"].passed
    assert all(line.passed for line in lines_of(artifact, manifest).values())


def test_another_rounding_makes_the_gate_red(artifact, tmp_path):
    def other(model):
        body = next(body for body in model.functions.values() if body.name == "QuantizeDequantizePerToken")
        node = next(node for node in body if node.op_type == "Round")
        node.op_type = "Floor"

    manifest = broken_copy(artifact, tmp_path / "broken", other)
    assert differing_values(ir.load(tmp_path / "broken" / "iter0.onnx")) > 1000
    found = lines_of(tmp_path / "broken", manifest)
    assert (found["linears"].passed, found["rounding"].passed) == (True, False)


def test_norms_absorb_the_factors(artifact, checkpoint):
    with safe_open(artifact / "params.safetensors", "np") as opened:
        folded = opened.get_tensor("model.layers.1.input_layernorm.weight")
    original = checkpoint.rows("model.layers.1.input_layernorm.weight", 0, len(folded))
    assert np.ptp(np.log((1 + original) / (1 + folded))) > 0.5
