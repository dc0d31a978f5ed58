"""Shared fixtures: tiny checkpoints, deterministic and offline."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest

from gemma_deploy.testing import write_tiny_checkpoint


@pytest.fixture(scope="session", params=["gemma", "gemma3_text"])
def model_type(request):
    return request.param


@pytest.fixture(scope="session")
def checkpoint_dir(model_type, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp(model_type) / "checkpoint", model_type)


@pytest.fixture(scope="session")
def staged_dir(checkpoint_dir, tmp_path_factory):
    from gemma_deploy.checkpoint import stage_checkpoint

    return stage_checkpoint(checkpoint_dir, tmp_path_factory.mktemp("staged") / "model")
