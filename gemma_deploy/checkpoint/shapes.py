"""Shapes under which tensors are read."""

from __future__ import annotations

import math


def as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape under which a tensor is read: matrices of all experts [experts, out, in] are one, below each other."""
    return shape if len(shape) < 3 else (math.prod(shape[:-1]), shape[-1])
