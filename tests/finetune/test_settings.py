"""Training arguments: checked against SFTConfig before the model is loaded, all offenders at once."""

import pytest

pytest.importorskip("trl")

from gemma_deploy.errors import UsageError
from gemma_deploy.finetune.arguments import read_pairs, sft_config, sft_values
from gemma_deploy.finetune.settings import FinetuneSettings


def asked(**sft):
    return FinetuneSettings(sft=sft)


def test_pairs_are_yaml():
    assert read_pairs(["max_steps=20", "learning_rate=2e-4", "optim=adafactor", "packing=true"]) == {
        "max_steps": 20, "learning_rate": "2e-4", "optim": "adafactor", "packing": True,
    }  # fmt: skip
    with pytest.raises(UsageError, match="--set max_steps is not understood"):
        read_pairs(["max_steps"])


def test_values_get_the_types_of_their_fields():
    assert sft_values(asked(learning_rate="2e-4", max_steps=20, optim="adafactor")) == {
        "learning_rate": 2e-4, "max_steps": 20, "optim": "adafactor",
    }  # fmt: skip


def test_every_offender_is_named():
    with pytest.raises(UsageError) as raised:
        sft_values(asked(max_step=1, output_dir="x", push_to_hub=True, max_steps="many", learning_rate=-1.0))
    said = "\n".join(raised.value.problems)
    assert "max_step: SFTConfig has no such field; did you mean max_steps?" in said
    assert "output_dir: is decided by out" in said
    assert "push_to_hub: is not taken here" in said
    assert "max_steps: 'many' does not fit" in said
    assert "learning_rate: -1.0 does not fit: it has to be above 0" in said


def test_what_sftconfig_refuses_is_a_sentence(tmp_path):
    with pytest.raises(UsageError, match="SFTConfig refuses the training arguments"):
        sft_config(asked(optim="nothing"), str(tmp_path), held_out=False)


def test_defaults(tmp_path):
    made = sft_config(asked(), str(tmp_path), held_out=True)
    assert (made.learning_rate, made.eval_strategy.value, made.eval_steps) == (2e-4, "steps", 50)
    assert sft_config(FinetuneSettings(method="full"), str(tmp_path), held_out=False).learning_rate == 2e-5
    assert made.gradient_checkpointing
