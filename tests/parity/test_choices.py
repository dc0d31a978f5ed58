"""Choices of experts that differ are counted as transformers' own routers make them, padding left out."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.choices import changed_choices, note_of
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.testing import TINY_EXPERTS, write_tiny_checkpoint

RNG = np.random.default_rng(0)
LENGTHS, STEPS = ((20, 13), (9,)), 3
CASES = [
    Case(
        name,
        tuple(tuple(RNG.integers(3, 500, one).tolist()) for one in lengths),
        tuple(tuple(RNG.integers(3, 500, STEPS).tolist()) for _ in lengths),
    )
    for name, lengths in zip(("text", "random"), LENGTHS, strict=True)
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model, and the same with rounding in front of its routers, as coarse as 4 bits."""
    paths = []
    for which in ("own", "coarse"):
        path = write_tiny_checkpoint(
            tmp_path_factory.mktemp(which), "gemma4_text", num_hidden_layers=2, dtype="F32", **TINY_EXPERTS
        )
        paths.append(path)
    tensors = load_file(path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    step = table.abs().amax(1, keepdim=True) / 7
    tensors["model.embed_tokens.weight"] = (table / step).round() * step
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return paths


@torch.inference_mode()
def stock_choices(path):
    """Of each sequence, run alone: sets of experts [layers, tokens]."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **eager).eval(), []
    for layer in model.model.layers:
        layer.experts.register_forward_pre_hook(
            lambda module, args: found.append([set(row) for row in args[1].tolist()])
        )
    for case in CASES:
        for row in range(len(case.prompts)):
            model(torch.tensor([case.sequence(row)]))
    return found


def test_choices_that_differ_are_those_of_the_stock_routers(checkpoints):
    sources = [TorchSource(Checkpoint.open(path), "hf") for path in checkpoints]
    for source in sources:
        source.run(CASES)
    own, coarse = map(stock_choices, checkpoints)
    differ = sum(a != b for one, other in zip(own, coarse, strict=True) for a, b in zip(one, other, strict=True))
    count = 2 * sum(size + STEPS for lengths in LENGTHS for size in lengths)
    assert 0 < differ < count / 2
    assert changed_choices(*sources, CASES) == (differ, count)
    said = f"{differ} of {count} choices of experts (tokens times layers) are others with the rounded weights"
    assert note_of(*sources, CASES) == [said]
    patched = TorchSource(Checkpoint.open(checkpoints[0]), "patched")
    patched.run(CASES)
    assert changed_choices(sources[0], patched, CASES) == (0, count)


def test_a_model_without_experts_is_told_nothing(tmp_path):
    source = TorchSource(Checkpoint.open(write_tiny_checkpoint(tmp_path, "gemma", num_hidden_layers=1)), "hf")
    source.run(CASES)
    assert note_of(source, source, CASES) == []
