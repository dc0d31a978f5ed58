"""A token table in the 16 bits it is stored in: the numbers of a float32 model, in half of the memory."""

import pytest
import torch

pytest.importorskip("trl")

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.finetune import table
from gemma_deploy.finetune.head import FLAG, add_summed_loss
from gemma_deploy.finetune.model import load_model
from gemma_deploy.finetune.table import StoredEmbedding, StoredHead
from gemma_deploy.testing import write_tiny_checkpoint
from tests.finetune.make import settings

KINDS = [("gemma3_text", True), ("gemma2", False), pytest.param("gemma", True, marks=pytest.mark.slow)]


def loss_and_gradient(model, ids):
    """Of the embedded tokens; the embedding itself is left out."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=ids, **{FLAG: True}).loss
    loss.backward()
    return loss.item(), embedded.grad


@pytest.mark.parametrize("class_name", ["stock", "patched"])
@pytest.mark.parametrize(("model_type", "tied"), KINDS)
def test_it_computes_what_a_float32_model_computes(model_type, tied, class_name, tmp_path, monkeypatch):
    """Against transformers' own, past the window of 8; the table is divided into blocks of 100 rows.

    sqrt(80) is no bfloat16, as that of the tiny models' 64 is.
    """
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(table, "BLOCK_BYTES", 100 * 4 * 80)
    base = write_tiny_checkpoint(tmp_path / "base", model_type, hidden_size=80, tie_word_embeddings=tied)
    model = load_model(settings(tmp_path, tmp_path, model=class_name), Checkpoint.open(base), tmp_path).eval()
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight.dtype, head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (embedding.weight is head.weight) == tied
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(embedding(ids), reference.get_input_embeddings()(ids))
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, reference(input_ids=ids).logits
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # measured: 1.1e-6
    add_summed_loss(model)
    add_summed_loss(reference)
    loss, gradient = loss_and_gradient(model, ids)
    theirs, wanted = loss_and_gradient(reference, ids)
    assert loss == pytest.approx(theirs, rel=1e-6)
    assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # measured: 2e-6


def test_it_stays_float32_where_it_is_trained_or_stored_so(tmp_path):
    stored = Checkpoint.open(write_tiny_checkpoint(tmp_path / "bf16", "gemma3_text"))
    floats = Checkpoint.open(write_tiny_checkpoint(tmp_path / "f32", "gemma3_text", dtype="F32"))
    for checkpoint, changes in (
        (stored, {"method": "full"}),
        (stored, {"accelerate_config": "fsdp.yaml"}),  # FSDP puts weights of one dtype together
        (floats, {}),
    ):
        model = load_model(settings(tmp_path, tmp_path, **changes), checkpoint, tmp_path)
        assert {one.dtype for one in model.parameters()} == {torch.float32}
        assert not any(isinstance(one, StoredEmbedding | StoredHead) for one in model.modules())
