"""Checkpoints: config and lazy tensors. Imports no torch."""

from typing import TYPE_CHECKING

from gemma_deploy.offering import offering

if TYPE_CHECKING:
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
__getattr__ = offering(
    __name__,
    {
        "Adapter": "gemma_deploy.checkpoint.adapters.adapter",
        "AdapterRef": "gemma_deploy.checkpoint.adapters.merging",
        "Checkpoint": "gemma_deploy.checkpoint.checkpoint",
        "ModelConfig": "gemma_deploy.checkpoint.config",
        "Rope": "gemma_deploy.checkpoint.config",
        "TensorInfo": "gemma_deploy.checkpoint.source",
        "WeightSource": "gemma_deploy.checkpoint.source",
        "coefficients": "gemma_deploy.checkpoint.expected",
        "expected_tensors": "gemma_deploy.checkpoint.expected",
        "resolve_checkpoint": "gemma_deploy.checkpoint.checkpoint",
    },
)
