"""Packed examples do not see each other: the loss of a packed row is that of its examples alone, past the window."""

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.finetune.head import FLAG
from gemma_deploy.finetune.run import finetune, prepare
from gemma_deploy.finetune.training import make_trainer
from tests.finetune.make import TEXTS, losses, settings, texts_file, tiny, trl_run

KINDS = ["gemma2", "gemma3_text", pytest.param("gemma", marks=pytest.mark.slow)]


@pytest.mark.parametrize("model_class", ["stock", "patched"])
@pytest.mark.parametrize("model_type", KINDS)
def test_the_loss_of_a_packed_row_is_that_of_its_examples(model_type, model_class, tmp_path):
    checkpoint = Checkpoint.open(tiny(tmp_path / "base", model_type))
    asked = settings(texts_file(tmp_path), tmp_path, sft={"packing": True}, max_length=64, model=model_class)
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


@pytest.mark.parametrize("model_class", ["stock", "patched"])
def test_no_token_sees_another_example(model_class, tmp_path):
    """Other tokens in one example: not a bit of the others' hidden states changes, within the window and past it."""
    checkpoint = Checkpoint.open(tiny(tmp_path / "base", "gemma3_text"))
    asked = settings(texts_file(tmp_path), tmp_path, sft={"packing": True}, max_length=64, model=model_class)
    trainer = make_trainer(prepare(asked, checkpoint, asked.data), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    first = trainer.train_dataset[0]["seq_lengths"][0]
    assert checkpoint.config.sliding_window < first < batch["input_ids"].shape[1]
    model = trainer.model.get_base_model().model.eval()
    ids, positions = batch["input_ids"], batch["position_ids"]
    other = ids.clone()
    other[:, :first] = (other[:, :first] + 100) % 1000

    def states(tokens, **positions):
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False, **positions).last_hidden_state

    found, changed = states(ids, position_ids=positions), states(other, position_ids=positions)
    assert torch.equal(found[:, first:], changed[:, first:])
    assert not torch.equal(found[:, :first], changed[:, :first])
    assert not torch.equal(states(ids)[:, first:], states(other)[:, first:])  # the same row, read as one text


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ["stock", "patched"])
def test_packed_training_is_that_of_trl(model_class, tmp_path):
    base = tiny(tmp_path / "base", "gemma3_text")
    small = {"r": 4, "alpha": 8}
    theirs = trl_run(base, [{"text": text} for text in TEXTS], tmp_path / "t", packing=True, max_length=64, **small)
    asked = settings(
        texts_file(tmp_path), tmp_path / "out", sft={"packing": True}, max_length=64, model=model_class, lora=small
    )
    found, expected = losses(finetune(asked, base).outcome.log), losses(theirs.state.log_history)
    assert len(found) == 4
    assert np.abs(np.subtract(found, expected)).max() <= 1e-5  # of 9 nats, as in test_training.py
