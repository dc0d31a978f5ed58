"""Each expert is quantized on its own tokens, those of the stock class with the weights that were quantized before."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_deploy.calibration.executors import open_executor
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.quantization import experts as experts_module
from gemma_deploy.quantization.layers import layer_file, quantize_layers
from gemma_deploy.quantization.rtn import quantize_rows
from gemma_deploy.quantization.solver import Settings, solve
from gemma_deploy.testing import TINY_EXPERTS, write_tiny_checkpoint

IDS = np.random.default_rng(5).integers(3, 500, (6, 40))  # five windows of 8
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
UNREACHED = 5


def write(path, unreached=False):
    """Two layers; on request an expert whose score, 0, is never among the largest three."""
    path = write_tiny_checkpoint(path, "gemma4_text", num_hidden_layers=2, **TINY_EXPERTS)
    if unreached:
        tensors = load_file(path / "model.safetensors")
        weight = tensors["model.layers.1.router.proj.weight"]
        weight[UNREACHED] = 0
        for one, other in ((0, 1), (2, 3), (4, 6)):  # one of each pair has a score above 0
            weight[other] = -weight[one]
        save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


def quantized(checkpoint, folder, settings=None, **more):
    return quantize_layers(checkpoint, IDS, settings or Settings(), folder=folder, key="k", **more)


def dequantized(found, name):
    """A matrix of a layer's file, or all experts' below each other."""
    codes, scale = found[name].float(), found[f"{name.removesuffix('.weight')}.scale"]
    return (codes.view(len(codes), scale.reshape(len(codes), -1).shape[1], -1) * scale.reshape(len(codes), -1, 1)).view(
        codes.shape
    )


@torch.inference_mode()
def read_by_experts(checkpoint, folder):
    """What the experts of layer 0 read in the stock class, and their numbers, with what was quantized before them."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, **eager).eval()
    found, state = load_file(layer_file(folder, 0)), model.state_dict()
    for name in found:
        if name.endswith(".weight"):
            coded = f"{name.removesuffix('.weight')}.scale" in found
            state[name].copy_(dequantized(found, name) if coded else found[name])
    seen = []
    model.model.layers[0].experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(torch.from_numpy(IDS))
    return seen[0][0], seen[0][1], found


@pytest.mark.parametrize("settings", [Settings(), Settings(bits=4, groupsize=32, kept_w8=("down_proj",))], ids=str)
def test_moments_and_codes_are_those_of_each_expert_s_tokens(tmp_path, monkeypatch, settings):
    checkpoint, seen = write(tmp_path / "ck"), []

    def watched(weights, moments, how, **more):
        assert more == {"tokens": None}
        seen.append((weights[0].clone(), moments.clone(), how))
        return solve(weights, moments, how)

    monkeypatch.setattr(experts_module, "solve", watched)
    records = quantized(checkpoint, tmp_path / "q", settings)
    x, chosen, found = read_by_experts(checkpoint, tmp_path / "q")
    assert records[0]["experts"]["unreached"] == []
    counts, name = [], f"model.layers.0.{GATE_UP}"
    gate_up = dequantized(found, name).view(8, 192, 64).double()
    for expert in range(8):
        own = x[(chosen == expert).any(-1)].double()
        counts.append(len(own))
        gate, up = (own @ gate_up[expert].T).chunk(2, dim=-1)
        inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
        for (weight, moments, how), read, stack in ((seen[expert], own, GATE_UP), (seen[8 + expert], inner, DOWN)):
            right = read.T @ read / len(read)
            # 3e-7 of the largest seen without bfloat16 tiles, which make 1e-4 of it
            torch.testing.assert_close(moments.double(), right, rtol=0, atol=1e-3 * float(right.max()))
            stored = checkpoint.rows(f"model.layers.0.{stack}", expert * len(weight), (expert + 1) * len(weight))
            assert np.array_equal(weight.numpy(), stored)
            assert how.bits == (8 if stack == DOWN else settings.bits)
            assert not how.equalize
            codes = found[f"model.layers.0.{stack}"].view(8, *weight.shape)[expert]
            assert torch.equal(codes, solve([weight], moments.clone(), how).weights[0].codes)
    assert records[0]["experts"]["fewest_tokens"] == min(counts)
    figures = records[0]["tensors"][GATE_UP]
    assert figures["loss"] < figures["rtn_loss"] < figures["signal"]


def test_noise_of_rounded_inputs_is_the_mean_over_tokens_and_their_experts(tmp_path, monkeypatch):
    """Of what reads the stream; of down_proj there is none, because its input stays."""
    monkeypatch.setattr(experts_module, "TOKENS_OF_ONE", 10_000)  # every token
    checkpoint = write(tmp_path / "ck")
    records = quantized(checkpoint, tmp_path / "q", Settings(activations=True))
    x, chosen, found = read_by_experts(checkpoint, tmp_path / "q")
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True) / 127
    error = (x / scale).round() * scale - x
    gate_up = dequantized(found, f"model.layers.0.{GATE_UP}").view(8, 192, 64).double()
    noise = [
        (gate_up[expert] @ error[token]).square().sum() / (gate_up[expert] @ x[token]).square().sum()
        for token, experts in enumerate(chosen.tolist())
        for expert in experts
    ]
    figures = records[0]["tensors"]
    right = float(torch.stack(noise).mean())
    assert figures[GATE_UP]["activation_noise"] == pytest.approx(right, rel=1e-3)
    assert "activation_noise" not in figures[DOWN]
    monkeypatch.undo()
    some = quantized(checkpoint, tmp_path / "some", Settings(activations=True))[0]["tensors"][GATE_UP]
    assert some["activation_noise"] == pytest.approx(right, rel=0.2)  # of a third of the tokens


def test_experts_without_tokens_are_rounded_to_nearest_and_told(tmp_path, caplog):
    checkpoint = write(tmp_path / "ck", unreached=True)
    with caplog.at_level(logging.WARNING):
        records = quantized(checkpoint, tmp_path / "q")
    assert [record["experts"]["unreached"] for record in records] == [[], [UNREACHED]]
    assert "model.layers.1: no token of the calibration text came to 1 of 8 experts (5)" in caplog.text
    found = load_file(layer_file(tmp_path / "q", 1))
    for stack in (GATE_UP, DOWN):
        codes, scale = found[f"model.layers.1.{stack}"], found[f"model.layers.1.{stack}.scale"]
        rows = slice(UNREACHED * len(codes) // 8, (UNREACHED + 1) * len(codes) // 8)
        nearest = quantize_rows(checkpoint.rows(f"model.layers.1.{stack}", rows.start, rows.stop))
        assert torch.equal(codes[rows], nearest[0])
        assert torch.equal(scale[rows], nearest[1])
        before = slice(rows.start - len(codes) // 8, rows.start)  # of the expert before it, which has tokens
        assert not torch.equal(codes[before], quantize_rows(checkpoint.rows(f"model.layers.1.{stack}", before.start,
                                                                            before.stop))[0])  # fmt: skip


def test_a_few_experts_at_a_time_give_the_same_bytes_and_progress_is_counted(tmp_path, monkeypatch):
    checkpoint, ticks = write(tmp_path / "ck"), []
    quantized(checkpoint, tmp_path / "all")
    monkeypatch.setattr(experts_module, "MOMENT_BYTES", 3 * 4 * 64**2)  # three at once
    quantized(checkpoint, tmp_path / "three", progress=lambda *seen: ticks.append(seen))
    passes = 4 + 2 * 3 + 1  # groups of linears, two for each three experts, the layer's output
    assert ticks == [(done, 2 * passes * 6) for done in range(1, 2 * passes * 6 + 1)]
    for layer in range(2):
        one, other = (layer_file(tmp_path / which, layer).read_bytes() for which in ("all", "three"))
        assert one == other


@pytest.mark.slow
def test_processes_give_the_same_bytes(tmp_path):
    checkpoint = write(tmp_path / "ck")
    quantized(checkpoint, tmp_path / "here")
    with open_executor(tmp_path / "there" / "shards", processes=2) as executor:
        quantized(checkpoint, tmp_path / "there", executor=executor)
    for layer in range(2):
        one, other = (layer_file(tmp_path / which, layer).read_bytes() for which in ("here", "there"))
        assert one == other


@pytest.mark.slow
def test_at_once_experts_see_the_attention_that_was_quantized(tmp_path):
    """Without `true_sequential` linears of a layer are solved together, experts behind them."""
    records = quantized(write(tmp_path / "ck"), tmp_path / "q", true_sequential=False)
    figures = records[1]["tensors"][DOWN]
    assert figures["loss"] < figures["rtn_loss"] < figures["signal"]
