"""What an adapter does to one tensor: adds a product of two factors, or puts other numbers in its place.

All arithmetic is NumPy's, in float32, as peft's for a float32 model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gemma_deploy.checkpoint.safetensors_reader import SafetensorsFile
from gemma_deploy.checkpoint.stored import Stored

AdapterTensor: TypeAlias = Stored[SafetensorsFile]


@dataclass(frozen=True)
class LowRank:
    """`scaling * B @ A` is added to a weight [out, in]; with a magnitude (DoRA) each row then gets that length.

    Args:
        first, second: lora_A [r, in] and lora_B [out, r]; of an embedding, lora_embedding_B [in, r] and
            lora_embedding_A [r, out], which are stored the other way round.
        r: the rank.
        scaling: alpha / r, or alpha / sqrt(r).
        embedding: of an embedding.
        magnitude: lora_magnitude_vector [out], of an embedding [in]; None without DoRA.
    """

    first: AdapterTensor
    second: AdapterTensor
    r: int
    scaling: float
    embedding: bool = False
    magnitude: AdapterTensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight."""
        inputs, outputs = self.first.entry.shape, self.second.entry.shape
        return (outputs[1], inputs[0]) if self.embedding else (outputs[0], inputs[1])

    def a(self) -> np.ndarray:
        """[r, in] float32."""
        return np.ascontiguousarray(self.first.whole().T) if self.embedding else self.first.whole()

    def b(self) -> np.ndarray:
        """[out, r] float32."""
        return self.b_rows(0, self.shape[0])

    def b_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of `b`."""
        if not self.embedding:
            return self.second.rows(start, stop)
        return np.ascontiguousarray(self.second.file.columns(self.second.name, start, stop).T)


@dataclass(frozen=True)
class Replaced:
    """Other numbers stand in the tensor's place (`modules_to_save`)."""

    stored: AdapterTensor


@dataclass(frozen=True)
class TokenRows:
    """Other numbers stand in some rows (`trainable_token_indices`).

    Args:
        stored: [len(indices), cols].
        indices: the row of each.
    """

    stored: AdapterTensor
    indices: tuple[int, ...]


Update: TypeAlias = LowRank | Replaced | TokenRows
