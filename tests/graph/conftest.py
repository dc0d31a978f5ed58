"""Exported graphs with their parameters, once per model type and form, shared by the test processes."""

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
def built(once):
    """(model type, scheme, dynamic) -> directory with iter0.onnx, iter1.onnx, params.safetensors, and the contract."""

    def build(model_type, scheme, dynamic=False):
        config = ModelConfig.from_dict(TINY_CONFIGS[model_type], "config.json")

        def make(out):
            checkpoint = write_tiny_checkpoint(out / "checkpoint", model_type)
            state = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
            graph_runs.build(config, scheme, state, out, dynamic=dynamic)

        out = once(f"graph-{model_type}-{scheme}{'-dynamic' * dynamic}", make)
        return out, graph_runs.contract_of(config, scheme, dynamic=dynamic)

    return build
