import pytest

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration import make


@pytest.fixture
def checkpoint_path(tmp_path):
    """A tiny Gemma 3 with a tokenizer, that a test may change."""
    path = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma3_text", num_hidden_layers=2, sliding_window_pattern=2)
    make.write_tokenizer(path)
    return path


@pytest.fixture
def checkpoint(checkpoint_path):
    return Checkpoint.open(checkpoint_path)


@pytest.fixture
def c4_file(tmp_path):
    return make.write_c4(tmp_path / "c4.json.gz")
