"""Packed examples do not see each other: the loss of a packed row is that of its examples alone, past the window."""

import pytest
import torch

pytest.importorskip("trl")

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import UsageError
from gemma_deploy.finetune.head import FLAG
from gemma_deploy.finetune.run import prepare
from gemma_deploy.finetune.training import make_trainer
from tests.finetune.make import settings, texts_file, tiny

KINDS = ["gemma2", "gemma3_text", pytest.param("gemma", marks=pytest.mark.slow)]


@pytest.mark.parametrize("model_type", KINDS)
def test_the_loss_of_a_packed_row_is_that_of_its_examples(model_type, tmp_path):
    checkpoint = Checkpoint.open(tiny(tmp_path / "base", model_type))
    asked = settings(texts_file(tmp_path), tmp_path, sft={"packing": True}, max_length=64)
    prepared = prepare(asked, checkpoint, asked.data)
    trainer = make_trainer(prepared, tmp_path)
    rows = [trainer.train_dataset[number] for number in range(len(trainer.train_dataset))]
    assert len(rows) < len(prepared.train.rows)
    assert max(len(row["seq_lengths"]) for row in rows) > 1
    model = trainer.model.eval()
    batch = trainer.data_collator(rows)
    assert "attention_mask" not in batch
    with torch.no_grad():
        packed = model(**batch, **{FLAG: True})
        alone = [
            model(input_ids=torch.tensor([list(row.ids)]), labels=torch.tensor([list(row.labels)]), **{FLAG: True})
            for row in prepared.train.rows
        ]
        mixed = model(input_ids=batch["input_ids"], labels=batch["labels"], **{FLAG: True})
    assert max(len(row.ids) for row in prepared.train.rows) > (checkpoint.config.sliding_window or 0)
    assert packed.tokens == sum(one.tokens for one in alone) == mixed.tokens
    expected = float(sum(one.loss for one in alone))
    assert float(packed.loss) == pytest.approx(expected, rel=2e-6)
    assert abs(float(mixed.loss) / expected - 1) > 1e-3  # the same row, read as one text


def test_the_patched_class_refuses_packing(tmp_path):
    checkpoint = Checkpoint.open(tiny(tmp_path / "base", "gemma3_text"))
    asked = settings(texts_file(tmp_path), tmp_path, sft={"packing": True}, model="patched")
    with pytest.raises(UsageError, match="does not keep packed examples apart"):
        prepare(asked, checkpoint, asked.data)
