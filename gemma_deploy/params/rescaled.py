"""A checkpoint whose linears and norms are multiplied by powers of two, so that its activations fit float16."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma_deploy.checkpoint import ModelConfig, TensorInfo, WeightSource
from gemma_deploy.quantization.rescaling import Rescaling


class RescaledCheckpoint:
    """A `WeightSource` over another one; tensors that nothing changes are given as they are.

    Args:
        source: whose weights; rescaling: what is stored divided by which power of two.
    """

    def __init__(self, source: WeightSource, rescaling: Rescaling) -> None:
        self.source, self.rescaling = source, rescaling
        self.path: Path = source.path
        self.config: ModelConfig = source.config
        self.tensors: Mapping[str, TensorInfo] = {
            name: replace(info, dtype="float32", nbytes=4 * math.prod(info.shape)) if self._is_changed(info) else info
            for name, info in source.tensors.items()
        }

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32."""
        rows = self.source.rows(name, start, stop)
        if not self._is_changed(self.source.tensors[name]):
            return rows
        return rescaled(rows, name, self.rescaling, norm_offset=self.config.architecture.norm_offset)

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same rows, or the source's own where nothing changes."""
        changed = self._is_changed(self.source.tensors[name])
        return (self.rows if changed else self.source.raw_rows)(name, start, stop)

    def weights_fingerprint(self) -> str:
        """Of the source and of the exponents."""
        exponents = json.dumps(self.rescaling.to_json()["exponents"], sort_keys=True)
        return hashlib.sha256(f"{self.source.weights_fingerprint()} {exponents}".encode()).hexdigest()

    def embedding_scale(self) -> np.ndarray | None:
        """The source's: the graph divides the embedding's output."""
        return self.source.embedding_scale()

    def _is_changed(self, info: TensorInfo) -> bool:
        return exponent_of(info.name, len(info.shape), self.rescaling) != 0


def exponent_of(name: str, dimensions: int, rescaling: Rescaling) -> int:
    """The power of two by which a matrix is multiplied, or a norm's gain divided; 0 for all other tensors."""
    module = name.removesuffix(".weight")
    if not name.endswith(".weight") or dimensions > 2:
        return 0
    if dimensions == 1:
        return rescaling.of(f"{module}.out")
    return rescaling.linear_shift(module) if ".layers." in name else 0


def rescaled(
    rows: np.ndarray, name: str, rescaling: Rescaling, *, norm_offset: float, undo: bool = False
) -> np.ndarray:
    """Rows with their tensor's power of two, float32: exact, but for the last bit of a norm's weight next to -1.

    Args:
        norm_offset: what a norm's gain is more than its weight; undo: take the power of two out again.
    """
    exponent = exponent_of(name, rows.ndim, rescaling) * (-1 if undo else 1)
    if rows.ndim > 1:
        return rows * np.float32(2.0**exponent)
    return ((norm_offset + rows.astype(np.float64)) * 2.0**-exponent - norm_offset).astype(np.float32)
