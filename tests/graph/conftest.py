"""The exported graphs, their contract and the stock model of the same checkpoint."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.testing import TINY_CONFIGS
from tests.exporting import contract_of


@pytest.fixture(scope="session")
def config(model_type):
    return ModelConfig.from_dict(TINY_CONFIGS[model_type], "config.json")


@pytest.fixture(scope="session")
def stock(checkpoint_dir):
    return AutoModelForCausalLM.from_pretrained(checkpoint_dir, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def built(artifacts):
    """(model type, scheme, dynamic) -> directory with iter0.onnx, iter1.onnx, params.safetensors, and the contract."""

    def build(model_type, scheme, dynamic=False):
        config = ModelConfig.from_dict(TINY_CONFIGS[model_type], "config.json")
        return artifacts(model_type, scheme, dynamic=dynamic), contract_of(config, scheme, dynamic=dynamic)

    return build
