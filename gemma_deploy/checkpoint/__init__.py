"""Checkpoints: config and lazy tensors. Imports no torch."""

from gemma_deploy.checkpoint.checkpoint import Checkpoint, TensorInfo, resolve_checkpoint
from gemma_deploy.checkpoint.config import ModelConfig, Rope
from gemma_deploy.checkpoint.expected import expected_tensors

__all__ = [
    "Checkpoint",
    "ModelConfig",
    "Rope",
    "TensorInfo",
    "expected_tensors",
    "resolve_checkpoint",
]
