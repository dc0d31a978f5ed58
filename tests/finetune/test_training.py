"""A run against TRL's own: the same losses at every step and the same adapter, on each generation, past the window."""

import json

import numpy as np
import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.finetune.run import finetune
from tests.finetune.make import (
    CHATS,
    TEXTS,
    adapter_of,
    loss_of,
    losses,
    settings,
    texts_file,
    tiny,
    trl_run,
    write_lines,
)

CLOSE = 1e-5  # of losses of 9 nats in float32; measured: up to 2e-6 with the stock class
SMALL = {"r": 4, "alpha": 8}
ROTATED = ["gemma3_text", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gemma", "gemma2"))]


@pytest.fixture(scope="module", params=ROTATED)
def base(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base") / "gemma3", "gemma3_text")


@pytest.fixture(scope="module")
def theirs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    trainer = trl_run(base, [{"text": text} for text in TEXTS], folder, **SMALL)
    trainer.save_model(str(folder / "adapter"))
    return losses(trainer.state.log_history), adapter_of(folder / "adapter")


def same_adapter(found, expected):
    """Adam's first steps have the size of the rate even where a gradient is rounding alone: norms are compared."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        apart = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert apart <= 1e-3, (name, apart)  # measured: up to 2.3e-4


@pytest.mark.parametrize("model", ["stock", "patched"])
def test_losses_and_adapter_are_those_of_trl(base, theirs, tmp_path, model):
    expected, adapter = theirs
    result = finetune(settings(texts_file(tmp_path), tmp_path / "out", lora=SMALL, model=model), base)
    found = losses(result.outcome.log)
    assert len(found) == len(expected) == 4
    assert len(set(expected)) == 4
    assert np.abs(np.subtract(found, expected)).max() <= CLOSE
    same_adapter(adapter_of(result.adapter), adapter)


def test_answers_alone_are_learned_as_trl_does_it(gemma3, tmp_path):
    """Conversations with TRL's own training template, which marks the answers."""
    from trl.chat_template_utils import gemma_chat_template

    (gemma3 / "chat_template.jinja").write_text(gemma_chat_template)
    rows = [{"messages": turns} for turns in CHATS]
    expected = losses(trl_run(gemma3, rows, tmp_path / "t", assistant_only_loss=True, **SMALL).state.log_history)
    every = losses(trl_run(gemma3, rows, tmp_path / "e", **SMALL).state.log_history)
    file = write_lines(tmp_path / "chat.jsonl", rows)
    found = finetune(settings(file, tmp_path / "out", lora=SMALL), gemma3).outcome.log
    also = finetune(settings(file, tmp_path / "all", lora=SMALL, loss="all"), gemma3).outcome.log
    assert np.abs(np.subtract(losses(found), expected)).max() <= CLOSE
    assert np.abs(np.subtract(losses(also), every)).max() <= CLOSE
    assert np.abs(np.subtract(expected, every)).max() > 1e-2


def test_what_is_left_in_out(gemma3, tmp_path):
    rows = [{"messages": turns} for turns in CHATS]
    file, held = write_lines(tmp_path / "chat.jsonl", rows), write_lines(tmp_path / "held.jsonl", rows[:2])
    result = finetune(settings(file, tmp_path / "out", lora=SMALL, eval_data=str(held)), gemma3)
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["adapter", "report.html", "run.json"]
    names = {one.name for one in result.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(gemma3.resolve())
    said = json.loads((tmp_path / "out" / "run.json").read_text())
    assert said["loss_after"] < said["loss_before"]
    assert said["perplexity_before"] == pytest.approx(np.exp(said["loss_before"]))
    assert len(said["samples"]) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "held-out perplexity" in page
    assert f"gemma-deploy compile RECIPE -s frontend.adapter={tmp_path / 'out' / 'adapter'}" in page
    assert "Call sorted and keep the result." in page
    with pytest.raises(UsageError, match="is finished already"):
        finetune(settings(file, tmp_path / "out", lora=SMALL, eval_data=str(held)), gemma3)


def test_held_out_loss_is_that_of_peft(gemma3, tmp_path):
    """The figures after the training, from PEFT's own reading of the adapter and transformers' own loss."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held = write_lines(tmp_path / "held.jsonl", [{"text": text} for text in TEXTS[:3]])
    result = finetune(settings(texts_file(tmp_path), tmp_path / "out", lora=SMALL, eval_data=str(held)), gemma3)
    model = AutoModelForCausalLM.from_pretrained(gemma3, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(result.adapter)
    assert result.outcome.loss_before == pytest.approx(loss_of(model, tokenizer, TEXTS[:3]), rel=1e-5)
    model = PeftModel.from_pretrained(model, result.adapter).eval()
    assert result.outcome.loss_after == pytest.approx(loss_of(model, tokenizer, TEXTS[:3]), rel=1e-5)


@pytest.mark.slow
def test_full_training_is_that_of_trl(gemma3, tmp_path):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from tests.finetune.make import QUICK

    arguments = {**QUICK, "learning_rate": 1e-3}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(gemma3, dtype=torch.float32, attn_implementation="eager"),
        args=SFTConfig(
            output_dir=str(tmp_path / "t"), logging_steps=1, report_to="none", bf16=False, save_strategy="no",
            **{key: value for key, value in arguments.items() if key != "save_steps"},
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=AutoTokenizer.from_pretrained(gemma3),
    )  # fmt: skip
    trainer.train()
    result = finetune(
        settings(texts_file(tmp_path), tmp_path / "out", method="full", sft={"learning_rate": 1e-3}), gemma3
    )
    found = losses(result.outcome.log)
    assert np.abs(np.subtract(found, losses(trainer.state.log_history))).max() <= 1e-5
    assert result.adapter is None
    saved = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    for name, value in trainer.model.state_dict().items():
        assert (saved.state_dict()[name] - value).abs().max() <= 1e-4, name
    stops = json.loads((result.model / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(stops) == sorted(json.loads((gemma3 / "generation_config.json").read_text())["eos_token_id"])


@pytest.mark.slow
def test_early_stopping_ends_and_keeps_the_best(gemma3, tmp_path):
    held = write_lines(tmp_path / "held.jsonl", [{"text": "zzzz qqqq xxxx"}])
    asked = settings(
        texts_file(tmp_path), tmp_path / "out", lora=SMALL, eval_data=str(held), patience=2,
        sft={"max_steps": 60, "learning_rate": 0.2, "save_steps": 1, "eval_steps": 1},
    )  # fmt: skip
    outcome = finetune(asked, gemma3).outcome
    assert outcome.stopped_early
    assert outcome.steps < 60
    best = min(one["eval_loss"] for one in outcome.log if "eval_loss" in one)
    assert outcome.loss_after == pytest.approx(best, rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run(gemma3, tmp_path):
    asked = settings(texts_file(tmp_path), tmp_path / "out", lora=SMALL, sft={"learning_rate": 1e30})
    with pytest.raises(DeployError, match="the loss is no number at step"):
        finetune(asked, gemma3)
    assert not (tmp_path / "out").exists()
