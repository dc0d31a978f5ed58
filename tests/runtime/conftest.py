"""One artifact per model type, scheme and batch for all tests of the run time, shared by the test processes."""

import pytest

from gemma_deploy.testing import write_tiny_checkpoint
from tests.runtime.make import write_artifact, write_tokenizer


@pytest.fixture(scope="session")
def artifacts(once):
    """(model type, scheme, batch) -> directory, read only, its checkpoint beside it."""

    def artifact(model_type, scheme, batch=2):
        def make(root):
            checkpoint = write_tiny_checkpoint(root / "checkpoint", model_type)
            write_artifact(checkpoint, root / "artifact", scheme, batch=batch)

        return once(f"runtime-{model_type}-{scheme}-{batch}", make) / "artifact"

    return artifact


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
