"""Exported graphs with their parameters, once per model type and form, shared by the test processes."""

import fcntl
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.testing import TINY_CONFIGS, write_tiny_checkpoint
from tests.graph import graph_runs


@pytest.fixture(scope="session")
def config(model_type):
    return ModelConfig.from_dict(TINY_CONFIGS[model_type], "config.json")


@pytest.fixture(scope="session")
def stock(checkpoint_dir):
    return AutoModelForCausalLM.from_pretrained(checkpoint_dir, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(model type, scheme, dynamic) -> directory with iter0.onnx, iter1.onnx, params.safetensors, and the contract."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    shared.mkdir(exist_ok=True)

    def build(model_type, scheme, dynamic=False):
        config = ModelConfig.from_dict(TINY_CONFIGS[model_type], "config.json")
        out = shared / f"{model_type}-{scheme}{'-dynamic' * dynamic}"
        with (shared / f"{out.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / "done").exists():
                out.mkdir()
                checkpoint = write_tiny_checkpoint(out / "checkpoint", model_type)
                state = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
                graph_runs.build(config, scheme, state, out, dynamic=dynamic)
                (out / "done").write_text(json.dumps(scheme))
        return out, graph_runs.contract_of(config, scheme, dynamic=dynamic)

    return build
