"""What is not built is said before any text is read."""

import pytest

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import NotBuiltError
from gemma_deploy.finetune.preparing import prepare
from gemma_deploy.testing import TINY_EXPERTS, write_tiny_checkpoint
from tests.finetune.make import settings


def test_training_a_model_with_experts_is_refused(tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", **TINY_EXPERTS))
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(NotBuiltError, match="training a model with experts") as refused:
        prepare(settings(missing, tmp_path / "out"), checkpoint, str(missing))
    assert refused.value.next_step
