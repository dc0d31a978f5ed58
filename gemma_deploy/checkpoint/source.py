"""Weights under the model's names, whoever has them: what every stage reads and what a stage that changes them gives.

A checkpoint is one; so is a checkpoint with quantized or rescaled tensors in the place of its own, and what an artifact
holds, put together again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gemma_deploy.checkpoint.config import ModelConfig


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its Hugging Face name, shape, dtype as stored, file, and bytes stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    nbytes: int


class WeightSource(Protocol):
    """Weights by name, read in blocks of rows."""

    @property
    def path(self) -> Path:
        """Where they come from, for messages."""

    @property
    def config(self) -> ModelConfig:
        """The model that the weights belong to."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name; those of the model, and what a stage adds (scales, factors)."""

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32, [stop - start, cols] (1-D tensors: [stop - start]); an array of its own."""

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same rows as stored, in the dtype of `tensors`: bfloat16 as uint16, GGUF blocks as uint8."""

    def weights_fingerprint(self) -> str:
        """Changes when what is read may change."""

    def embedding_scale(self) -> np.ndarray | None:
        """[hidden] by which embedded rows are multiplied, sqrt(hidden_size) included; None where it is that alone."""
