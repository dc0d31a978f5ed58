"""GGUF files of Gemma 3n, written with gguf-py as llama.cpp's converter does, against their safetensors."""

import math

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.patched import fill_numbers, patched_causal
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.checkpoint import gguf_make

TABLE = "model.embed_tokens_per_layer.weight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """With a vector for every token."""
    path = tmp_path_factory.mktemp("3n") / "ck"
    return write_tiny_checkpoint(path, "gemma3n_text", vocab_size_per_layer_input=512)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_equals_the_hugging_face_checkpoint(directory, tmp_path):
    theirs = Checkpoint.open(directory)
    ours = Checkpoint.open(gguf_make.write_gemma3n(tmp_path / "m.gguf", directory))
    assert ours.config == theirs.config
    assert ours.config.layers == theirs.config.layers
    assert ours.config.per_layer == theirs.config.per_layer
    assert not ours.notes
    assert list(ours.tensors) == list(theirs.tensors)
    for tensor, info in theirs.tensors.items():
        assert np.array_equal(ours.rows(tensor, 0, info.shape[0]), theirs.rows(tensor, 0, info.shape[0])), tensor


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_blocks_of_every_large_matrix(directory, tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    theirs = Checkpoint.open(directory)
    ours = Checkpoint.open(gguf_make.write_gemma3n(tmp_path / "m.gguf", directory, kind=kind))
    rounded = 0
    for tensor, info in theirs.tensors.items():
        right = theirs.rows(tensor, 0, info.shape[0])
        if right.ndim == 2 and not any(part in tensor for part in gguf_make.SMALL):
            right = gguf.quants.dequantize(gguf.quants.quantize(right, kind), kind)
            rounded += 1
        assert np.array_equal(ours.rows(tensor, 0, info.shape[0]), right), tensor
    assert rounded > 50


def test_it_computes_what_transformers_computes(tmp_path):
    """The patched class with what the file says, and transformers' own with the staged directory; five windows.

    Tokens have vectors: of the 32 behind them transformers reads the first row, and the file has zeros.
    """
    directory = write_tiny_checkpoint(tmp_path / "ck", "gemma3n_text")
    ids = torch.randint(3, 480, (1, 40), generator=torch.Generator().manual_seed(5))
    stock = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    write_tokenizer(tmp_path)
    checkpoint = Checkpoint.open(gguf_make.write_gemma3n(tmp_path / "m.gguf", directory))
    assert checkpoint.config.per_layer.rows == 512
    assert not checkpoint.rows(TABLE, 480, 512).any()
    patched = patched_causal(checkpoint.config).to_empty(device="cpu").eval()
    patched.tie_weights()
    state = {name: checkpoint.rows(name, 0, info.shape[0]) for name, info in checkpoint.tensors.items()}
    left = patched.load_state_dict({name: torch.from_numpy(rows) for name, rows in state.items()}, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= {"lm_head.weight"}
    fill_numbers(patched, checkpoint)
    staged = stage_checkpoint(checkpoint.path, tmp_path / "staged")
    again = AutoModelForCausalLM.from_pretrained(staged, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        right = stock.eval()(ids).logits
        for made in (patched(ids).logits, again.eval()(ids).logits):
            # shares of gates come back as 0.95 from the float32 of its quantile: measured 0
            assert (made - right).abs().max() <= 1e-6 * right.abs().max()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention__sliding_window_pattern": None}, "gemma3n.attention.sliding_window_pattern is missing"),
        ({"attention__sliding_window": None}, "gemma3n.attention.sliding_window is missing"),
        ({"attention__shared_kv_layers": None}, "gemma3n.attention.shared_kv_layers is missing"),
        ({"embedding_length_per_layer_input": 0}, "gemma3n.embedding_length_per_layer_input: got 0, expected a whole"),
        ({"altup__num_inputs": None}, "gemma3n.altup.num_inputs is missing"),
        ({"altup__num_inputs": 3}, "unexpected: model.altup_projections.2.weight [64, 64]"),
        ({"altup__active_idx": 4}, "altup_active_idx: got 4, expected the number of a stream"),
        ({"activation_sparsity_scale": None}, "gemma3n.activation_sparsity_scale is missing: expected a list of 7"),
        ({"activation_sparsity_scale": [1.0] * 6}, "gemma3n.activation_sparsity_scale: got [1.0"),
        ({"activation_sparsity_scale": [math.nan] * 7}, "gemma3n.activation_sparsity_scale: got [nan"),
        ({"feed_forward_length": [160] * 6}, "gemma3n.feed_forward_length: got [160"),
        ({"feed_forward_length": 160}, "model.layers.2.mlp.gate_proj.weight is [96, 64], the metadata call for [160"),
    ],
)
def test_missing_or_contradicting_metadata_are_told_by_name(directory, tmp_path, changes, said):
    assert said in refusal(gguf_make.write_gemma3n(tmp_path / "m.gguf", directory, **changes))


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("blk.0.laurel_l.weight", "blk.0.laurel_l.weight is missing: expected the matrix whose rows"),
        ("altup_proj.weight", "missing: model.altup_projections.0.weight [64, 64]"),
        ("blk.3.altup_correct_scale.weight", "missing: model.layers.3.altup.correct_output_scale [64]"),
    ],
)
def test_missing_tensors_are_told_by_name(directory, tmp_path, monkeypatch, gone, said):
    right = gguf_make.write

    def write(path, architecture, metadata, tensors, **options):
        kept = {name: value for name, value in tensors.items() if name != gone}
        assert len(kept) == len(tensors) - 1
        return right(path, architecture, metadata, kept, **options)

    monkeypatch.setattr(gguf_make, "write", write)
    assert said in refusal(gguf_make.write_gemma3n(tmp_path / "m.gguf", directory))
