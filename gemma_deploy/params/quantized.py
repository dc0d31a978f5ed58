"""A checkpoint with the quantizer's results: codes, scales and folded norms in the place of what they were made from.

The matrix that the LM head reads (the token table where they are tied) has its columns scaled.

Consumed like a checkpoint by `write_params`, which copies codes and scales as they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from gemma_deploy.checkpoint import TensorInfo, WeightSource
from gemma_deploy.dtypes import BY_SAFETENSORS
from gemma_deploy.names import COLUMN_SCALE

FACTORS = "factors"


@dataclass(frozen=True)
class OutputError:
    """What quantizing a matrix did to the output of its linear.

    Args:
        sqnr_db: of the linear's output on the calibration text, in dB; None without an error.
        energy: mean square of that output.
    """

    sqnr_db: float | None
    energy: float


class QuantizedCheckpoint:
    """A `WeightSource` over a checkpoint and the files of `quantize_layers`.

    Args:
        checkpoint: what is not replaced.
        files: one per layer, and that of the table.
        records: what was written about each layer.

    Attributes:
        output_errors: of the matrices whose codes it has, by name.
    """

    def __init__(self, checkpoint: WeightSource, files: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> None:
        self._factors: np.ndarray | None = None
        self.checkpoint, self.path, self.config = checkpoint, checkpoint.path, checkpoint.config
        self._files: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = dict(checkpoint.tensors)
        for file in files:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name == FACTORS:
                        self._factors = opened.get_tensor(name)
                        continue
                    view = opened.get_slice(name)
                    shape, dtype = tuple(view.get_shape()), BY_SAFETENSORS[view.get_dtype()]
                    nbytes = math.prod(shape) * dtype.itemsize
                    self.tensors[name] = TensorInfo(name, shape, dtype.name, file, nbytes)
                    self._files[name] = file
        if self._factors is not None:
            head = checkpoint.tensors[checkpoint.config.head_weight]
            self.tensors[head.name] = replace(head, dtype="float32", nbytes=4 * math.prod(head.shape))
        self.output_errors = {
            self._name_of(f"{record['layer']}.{linear}"): OutputError(
                _sqnr_db(found["signal"], found["loss"]), found["signal"]
            )
            for record in records
            for linear, found in record["tensors"].items()
        }

    def _name_of(self, module: str) -> str:
        """Of the tensor with a module's matrix; experts have theirs by its own name."""
        return module if module in self._files else f"{module}.weight"

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32."""
        if name in self._files or self._is_scaled(name):
            return self.raw_rows(name, start, stop).astype(np.float32)
        return self.checkpoint.rows(name, start, stop)

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same rows as stored."""
        if self._is_scaled(name):
            scaled: np.ndarray = self.checkpoint.rows(name, start, stop) * self._factors
            return scaled
        if name not in self._files:
            return self.checkpoint.raw_rows(name, start, stop)
        with safe_open(self._files[name], framework="np") as opened:
            rows: np.ndarray = opened.get_slice(name)[start:stop]
        return rows

    def embedding_scale(self) -> np.ndarray | None:
        """Of a table whose columns were multiplied by factors."""
        if COLUMN_SCALE not in self.tensors:
            return self.checkpoint.embedding_scale()
        return self.rows(COLUMN_SCALE, 0, self.config.hidden_size)

    def _is_scaled(self, name: str) -> bool:
        return self._factors is not None and name == self.config.head_weight

    def weights_fingerprint(self) -> str:
        """Of the checkpoint and of every replaced tensor's file."""
        digest = hashlib.sha256(self.checkpoint.weights_fingerprint().encode())
        for file in sorted(set(self._files.values())):
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()


def _sqnr_db(signal: float, loss: float) -> float | None:
    return round(10 * math.log10(signal / loss), 4) if signal > 0 and loss > 0 else None
