"""Checkpoints: config and lazy tensors. Imports no torch."""

from gemma_deploy.checkpoint.adapters.adapter import Adapter
from gemma_deploy.checkpoint.adapters.merging import AdapterRef
from gemma_deploy.checkpoint.checkpoint import Checkpoint, resolve_checkpoint
from gemma_deploy.checkpoint.config import ModelConfig, Rope
from gemma_deploy.checkpoint.expected import coefficients, expected_tensors
from gemma_deploy.checkpoint.source import TensorInfo, WeightSource

__all__ = [
    "Adapter",
    "AdapterRef",
    "Checkpoint",
    "ModelConfig",
    "Rope",
    "TensorInfo",
    "WeightSource",
    "coefficients",
    "expected_tensors",
    "resolve_checkpoint",
]
