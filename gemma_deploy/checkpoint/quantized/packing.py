"""Codes of 4 or 8 bits in 32-bit words, the first in the lowest bits."""

from __future__ import annotations

import numpy as np

WORD_BITS = 32
BUILT_BITS = (4, 8)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """[rows, words] of 32 bits -> uint8 [rows, words * 32 / bits], each word's codes from the lowest bits on."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), 4 * words.shape[1])  # little-endian
    if bits == 8:
        return octets
    codes = np.empty((len(octets), 2 * octets.shape[1]), np.uint8)
    np.bitwise_and(octets, 15, out=codes[:, 0::2])
    np.right_shift(octets, 4, out=codes[:, 1::2])
    return codes


def words_of(count: int, bits: int) -> int:
    """Words that hold so many codes."""
    return -(-count * bits // WORD_BITS)
