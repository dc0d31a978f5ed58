"""GGUF's Q4_0 and Q8_0: blocks of 32 columns with a float16 scale in front of their codes.

Q4_0 has two codes a byte, column i in the low half and i + 16 in the high one, eight more than they mean; Q8_0 is int8.
QAT checkpoints of Gemma are Q4_0. The other types have minima or scales of scales, and are dequantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.checkpoint.quantized.matrix import CodedMatrix, QuantizedWeight
from gemma_deploy.checkpoint.shapes import as_matrix
from gemma_deploy.schemes import Codes

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.stored import Stored

BITS = {"Q4_0": 4, "Q8_0": 8}
BLOCK = 32
FLOATS = ("F32", "F16", "BF16")


class BlockMatrix(CodedMatrix):
    """A tensor of Q4_0 or Q8_0.

    Args:
        stored: it.
    """

    def __init__(self, stored: Stored[Any]) -> None:
        kind, (rows, columns) = stored.entry.dtype, as_matrix(stored.entry.shape)
        super().__init__(
            stored.name, (rows, columns), (stored,), bits=BITS[kind], groups=columns // BLOCK, packing=f"GGUF {kind}"
        )

    def differences(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`."""
        octets = self._blocks(start, stop)[..., 2:]
        if self.bits == 8:
            return octets.view(np.int8).reshape(stop - start, -1).astype(np.int16)
        halves = np.concatenate([octets & 15, octets >> 4], axis=-1)
        return halves.reshape(stop - start, -1).astype(np.int16) - 8

    def scales(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`."""
        halves = np.ascontiguousarray(self._blocks(start, stop)[..., :2]).view("<f2")
        return halves.reshape(stop - start, self.groups).astype(np.float32)

    def _blocks(self, start: int, stop: int) -> np.ndarray:
        """uint8 [rows, groups, bytes of a block]."""
        found: np.ndarray = self.parts[0].raw_rows(start, stop).reshape(stop - start, self.groups, -1)
        return found


class OtherBlocks(QuantizedWeight):
    """A tensor of another type that the gguf package dequantizes.

    Args:
        stored: it.
    """

    def __init__(self, stored: Stored[Any]) -> None:
        rows, columns = as_matrix(stored.entry.shape)
        super().__init__(stored.name, (rows, columns), (stored,))

    @property
    def described(self) -> str:
        """See `QuantizedWeight`."""
        return f"GGUF {self.parts[0].entry.dtype}"

    def why_not(self, form: Codes) -> str | None:
        """See `QuantizedWeight`."""
        return f"{self.parts[0].entry.dtype} is no code times a scale of 16 bits"

    def rows(self, start: int, stop: int) -> np.ndarray:
        """See `QuantizedWeight`."""
        return self.parts[0].rows(start, stop)


def blocks_of(stored: Stored[Any]) -> QuantizedWeight | None:
    """The quantized weight that a tensor of a .gguf file is; None of floats and vectors."""
    if stored.entry.dtype in FLOATS or len(stored.entry.shape) < 2:
        return None
    return (BlockMatrix if stored.entry.dtype in BITS else OtherBlocks)(stored)
