"""Matrices in panels of 16 rows, as the library of `backend.type: native` reads them, and back.

Its src/layout.h says why. A matrix [rows, columns] is padded with zeros to a multiple of 16 rows and, but for scales,
to one of 64 columns (4 bits: 128); a vector to a multiple of 16. So every tensor is a multiple of 64 bytes and all are
aligned to that. Panels follow each other; within one:

- 8 bits: [columns / 4][16 rows][4 columns]
- 4 bits: [columns / 128][16][16 rows][4 columns], the low half of a byte column k, the high half column k + 64
- bfloat16: [columns / 2][16 rows][2 columns]
- float16, float32 (scales too): [columns][16 rows]

The 8 bits of a head that is screened lie in two planes: panels of their high halves as those of 4 bits, and behind the
last of them the low halves, row by row, [rows][columns / 64][32], the low half of a byte column k, the high half
k + 32. Their scales lie row by row as well.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.dtypes import BY_NAME, StoredDtype

if TYPE_CHECKING:
    import torch

ROWS = 16
COLUMNS, NIBBLE_COLUMNS = 64, 128


def padded(shape: tuple[int, ...], dtype: StoredDtype, *, planes: bool = False) -> tuple[int, ...]:
    """The shape in the file of a matrix [..., rows, columns], whose first dimensions become one, or of a vector."""
    if len(shape) == 1:
        return (_up(shape[0], ROWS),)
    columns = NIBBLE_COLUMNS if planes or BY_NAME[dtype].packed else COLUMNS
    return (_up(math.prod(shape[:-1]), ROWS), _up(shape[-1], columns))


def padded_scales(
    shape: tuple[int, ...], matrix: tuple[int, ...], dtype: StoredDtype, *, planes: bool = False
) -> tuple[int, ...]:
    """The shape in the file of a matrix's scales, [rows in the file, groups].

    Args:
        shape: of the scales, one for each row or for each group of columns; matrix, dtype, planes: of their matrix.
    """
    rows, columns = padded(matrix, dtype, planes=planes)
    groups = math.prod(shape) // math.prod(matrix[:-1])
    return (rows, 1 if groups == 1 else columns // (matrix[-1] // groups))


def pack(block: torch.Tensor, dtype: StoredDtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows of a matrix as panels.

    Args:
        block: [rows, columns]; of codes int8, signed. A number of rows that is no multiple of 16 is padded.
        shape: of the whole matrix in the file.

    Returns:
        The bytes of the panels, of any shape.
    """
    import torch

    if len(shape) == 1:
        flat = block.reshape(-1)
        return torch.nn.functional.pad(flat, (0, -len(flat) % ROWS))
    block = padded_rows(block, shape)
    panels, columns = len(block) // ROWS, block.shape[1]
    if dtype == "uint8":
        codes = block.view(torch.uint8) ^ 0x80
        return codes.view(panels, ROWS, columns // 4, 4).transpose(1, 2).contiguous()
    if dtype == "uint4":
        return _nibbles((block + 8).view(torch.uint8))
    if dtype == "bfloat16":
        return block.view(panels, ROWS, columns // 2, 2).transpose(1, 2).contiguous()
    return block.view(panels, ROWS, columns).transpose(1, 2).contiguous()


def pack_planes(block: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of codes int8 as `pack` takes them, in two planes.

    Returns:
        The bytes of the panels of high halves, and those of the low halves.
    """
    import torch

    block = padded_rows(block, shape)
    codes = block.view(torch.uint8) ^ 0x80
    pairs = (codes & 15).view(len(block), -1, 2, COLUMNS // 2)
    return _nibbles(codes >> 4), (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).contiguous()


def unpack_planes(high: np.ndarray, low: np.ndarray, columns: int) -> np.ndarray:
    """The inverse of `pack_planes`: codes int8 [16 * panels, columns in the file].

    Args:
        high: the bytes of whole panels; low: those of their rows; columns: in the file.
    """
    pairs = low.reshape(-1, columns // COLUMNS, COLUMNS // 2)
    lower = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, columns)
    return unpack(high, "uint4", columns) * np.int8(16) + lower.astype(np.int8)


def padded_rows(block: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows [rows, ...] of a matrix with zeros behind them: of whole panels, as wide as in the file.

    Args:
        shape: of the whole matrix in the file.
    """
    import torch

    block = block.reshape(len(block), -1)
    return torch.nn.functional.pad(block, (0, shape[1] - block.shape[1], 0, -len(block) % ROWS))


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Panels of 4 bits: codes [rows, columns] from 0 to 15."""
    halves = codes.view(-1, ROWS, codes.shape[1] // NIBBLE_COLUMNS, 2, 16, 4).permute(3, 0, 2, 4, 1, 5)
    return (halves[0] | (halves[1] << 4)).contiguous()


def unpack(stored: np.ndarray, dtype: str, columns: int) -> np.ndarray:
    """Panels as rows [16 * panels, columns in the file]: codes int8, floats as they are, bfloat16 as its bits.

    Args:
        stored: the bytes, or elements, of whole panels; columns: in the file.
    """
    if dtype == "uint8":
        codes = stored.view(np.uint8).reshape(-1, columns // 4, ROWS, 4).swapaxes(1, 2)
        return (codes ^ 0x80).view(np.int8).reshape(-1, columns)
    if dtype == "uint4":
        pairs = stored.view(np.uint8).reshape(-1, columns // NIBBLE_COLUMNS, 16, ROWS, 4)
        both = np.stack([pairs & 15, pairs >> 4])  # [2, panels, blocks, 16, rows, 4]
        return (both.transpose(1, 4, 2, 0, 3, 5).reshape(-1, columns).astype(np.int8)) - np.int8(8)
    if dtype == "bfloat16":
        return stored.reshape(-1, columns // 2, ROWS, 2).swapaxes(1, 2).reshape(-1, columns)
    return stored.reshape(-1, columns, ROWS).swapaxes(1, 2).reshape(-1, columns)


def _up(count: int, of: int) -> int:
    return -(-count // of) * of
