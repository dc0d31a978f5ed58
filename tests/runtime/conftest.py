"""One artifact per model type, scheme and batch for all tests of the run time, shared by the test processes."""

import fcntl
import os

import pytest

from gemma_deploy.testing import write_tiny_checkpoint
from tests.runtime.make import write_artifact, write_tokenizer


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """(model type, scheme, batch) -> directory, read only, its checkpoint beside it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts"
    shared.mkdir(exist_ok=True)

    def artifact(model_type, scheme, batch=2):
        root = shared / f"{model_type}-{scheme}-{batch}"
        with (shared / f"{root.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / "done").exists():
                checkpoint = write_tiny_checkpoint(root / "checkpoint", model_type)
                write_artifact(checkpoint, root / "artifact", scheme, batch=batch)
                (root / "done").touch()
        return root / "artifact"

    return artifact


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
