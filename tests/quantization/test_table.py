"""Column factors of what the LM head reads: folded into the final norm and undone in the head's own matrix."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.params import build_plan
from gemma_deploy.params.quantized import QuantizedCheckpoint
from gemma_deploy.quantization import table as table_module
from gemma_deploy.quantization.layers import quantize_layers
from gemma_deploy.quantization.solver import Settings
from gemma_deploy.quantization.table import scale_table, table_file
from gemma_deploy.schemes import Codes
from gemma_deploy.testing import write_tiny_checkpoint

IDS = np.random.default_rng(5).integers(3, 500, (2, 24))
TABLE, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
COLUMN_SCALE = "model.embed_tokens.column_scale"


@pytest.fixture
def doubled(monkeypatch):
    """Every other column has the factor 2, which no float rounds."""
    factors = torch.ones(64)
    factors[::2] = 2.0
    monkeypatch.setattr(table_module, "column_factors", lambda weights, power: factors)
    return factors.numpy()


def quantized_of(tmp_path, tied):
    checkpoint = Checkpoint.open(
        write_tiny_checkpoint(tmp_path / "ck", "gemma3_text", num_hidden_layers=2, tie_word_embeddings=tied)
    )
    quantize_layers(checkpoint, IDS, Settings(), folder=tmp_path / "q", key="k")
    scale_table(checkpoint, IDS.shape, tmp_path / "q", codes=Codes())
    return checkpoint, QuantizedCheckpoint(checkpoint, [table_file(tmp_path / "q")], [])


def rows(source, name):
    return source.rows(name, 0, source.tensors[name].shape[0])


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_the_checkpoints_logits_with_the_scaled_matrices(tmp_path, doubled, tied):
    checkpoint, quantized = quantized_of(tmp_path, tied)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.from_numpy(IDS)
    with torch.inference_mode():
        expected = model(ids).logits
        if tied:  # embedding and head have different matrices for a moment
            model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(rows(quantized, TABLE).copy()))
            factor = rows(quantized, COLUMN_SCALE) / np.float32(64) ** 0.5
            model.model.embed_tokens.weight.copy_(torch.from_numpy(rows(quantized, TABLE) * factor))
        else:
            model.lm_head.weight.copy_(torch.from_numpy(rows(quantized, HEAD).copy()))
            model.model.embed_tokens.weight.copy_(torch.from_numpy(rows(quantized, TABLE).copy()))
        model.model.norm.weight.copy_(torch.from_numpy(rows(quantized, NORM).copy()))
        found = model(ids).logits
    # 1 + w is rounded once more: a few ulp
    assert float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_an_untied_head_is_scaled_and_the_table_is_not(tmp_path, doubled):
    checkpoint, quantized = quantized_of(tmp_path, tied=False)
    np.testing.assert_array_equal(rows(quantized, HEAD), rows(checkpoint, HEAD) * doubled)
    np.testing.assert_array_equal(rows(quantized, TABLE), rows(checkpoint, TABLE))
    assert quantized.tensors[HEAD].dtype == "float32"
    assert COLUMN_SCALE not in quantized.tensors


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_has_a_scale_for_each_column_where_it_shares_the_heads_matrix(tmp_path, tied):
    path = write_tiny_checkpoint(tmp_path / "ck", "gemma3_text", num_hidden_layers=2, tie_word_embeddings=tied)
    plan = build_plan(Checkpoint.open(path).config, "w8a16_folded", 32)
    assert (COLUMN_SCALE in {spec.name for spec in plan}) is tied
