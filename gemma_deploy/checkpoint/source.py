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

COMPARED_BYTES = 8 << 20  # of each of two matrices at a time


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its Hugging Face name, shape (`as_matrix`), dtype as stored, file, and bytes stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    nbytes: int


class Described(Protocol):
    """Shape and dtype of a tensor; an entry of any file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] of a linear."""

    @property
    def dtype(self) -> str:
        """As in dtypes.py, or of GGUF blocks."""


class Rows(Protocol):
    """A matrix, or a vector, that is read in blocks of rows; a `Stored` of a file is one."""

    @property
    def entry(self) -> Described:
        """Shape and dtype."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32, [stop - start, cols] (1-D: [stop - start])."""

    def raw_rows(self, start: int, stop: int) -> np.ndarray:
        """The same rows as stored."""


def equal(one: Rows, other: Rows) -> bool:
    """Whether two matrices hold the same numbers; read in blocks, up to the first difference."""
    if one.entry.shape != other.entry.shape:
        return False
    count, width = one.entry.shape
    step = max(1, COMPARED_BYTES // (4 * width))
    alike = one.entry.dtype == other.entry.dtype
    for start in range(0, count, step):
        stop = min(start + step, count)
        if alike and np.array_equal(one.raw_rows(start, stop), other.raw_rows(start, stop)):
            continue
        if not np.array_equal(one.rows(start, stop), other.rows(start, stop)):
            return False
    return True


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
