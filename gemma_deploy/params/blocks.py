"""Codes as llama.cpp lays them out: runs of 32 columns, each behind its scale, a number of float16.

`q8_0`: 32 signed bytes. `q4_0`: 16 bytes, codes from -8 to 7 with 8 added; column i of the block lies in the low half
of byte i, column i + 16 in the high half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.dtypes import BLOCK, BY_NAME

if TYPE_CHECKING:
    import torch

SCALE_BYTES = 2
ZERO = 8  # what is added to a code of 4 bits


def encode(codes: torch.Tensor, scales: torch.Tensor, dtype: str) -> torch.Tensor:
    """Blocks of some rows.

    Args:
        codes: int8 [rows, columns]; scales: [rows, columns / 32], numbers of float16.
        dtype: `q8_0` or `q4_0`.

    Returns:
        uint8 [rows, bytes].
    """
    import torch

    rows, groups = scales.shape
    blocks = torch.empty(rows, groups, BY_NAME[dtype].block, dtype=torch.uint8)
    blocks[..., :SCALE_BYTES] = scales.to(torch.float16).contiguous().view(torch.uint8).view(rows, groups, SCALE_BYTES)
    grouped = codes.reshape(rows, groups, BLOCK)
    if BY_NAME[dtype].bits == 8:
        blocks[..., SCALE_BYTES:] = grouped.contiguous().view(torch.uint8)
    else:
        raised = (grouped + ZERO).to(torch.uint8)
        blocks[..., SCALE_BYTES:] = raised[..., : BLOCK // 2] | (raised[..., BLOCK // 2 :] << 4)
    return blocks.view(rows, -1)


def decode(stored: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The inverse.

    Args:
        stored: uint8 [rows, bytes].

    Returns:
        int8 [rows, columns], float32 [rows, columns / 32].
    """
    rows, block = len(stored), BY_NAME[dtype].block
    blocks = stored.reshape(rows, -1, block)
    scales = np.ascontiguousarray(blocks[..., :SCALE_BYTES]).view(np.float16)[..., 0].astype(np.float32)
    codes = np.ascontiguousarray(blocks[..., SCALE_BYTES:])
    if BY_NAME[dtype].bits == 8:
        return codes.view(np.int8).reshape(rows, -1), scales
    halves = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.int8)
    return (halves - np.int8(ZERO)).reshape(rows, -1), scales
