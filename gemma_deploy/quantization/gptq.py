"""GPTQ: each column is rounded after the errors of the columns before it were moved onto it.

Frantar et al. 2022, arXiv:2210.17323. Computed in the form of Chee et al. 2023 (QuIP, arXiv:2307.13304, theorem 6),
which rounds to the same numbers and needs neither the inverse of the moments nor a second factorization:

    H = R R^T, U = R / diag(R);  z_j = w_j + sum_{i<j} (w_i - q_i) U_ij;  q_j = round(z_j)

Inside a block of columns the recursion halves the range, so that nearly all arithmetic is matrix products.
"""

from __future__ import annotations

import torch

from gemma_deploy.quantization.moments import Factor

LEAF = 8


def gptq(weight: torch.Tensor, units: torch.Tensor, factor: Factor, *, qmax: int, blocksize: int = 128) -> torch.Tensor:
    """Round to codes in [-qmax, qmax].

    Args:
        weight: [columns, rows] float32, a row per input channel, in the order in which columns are rounded.
        units: [columns, rows], what code 1 stands for.
        factor: of the inputs' second moments, in the same order of columns.
        qmax: largest code.
        blocksize: columns between two products with all columns before them; changes speed alone.

    Returns:
        [columns, rows] float32 codes.
    """
    rounding = _Rounding(weight, units, factor, qmax=qmax)
    for start in range(0, len(weight), blocksize):
        stop = min(start + blocksize, len(weight))
        z = weight[start:stop].clone()
        if start:
            rounding.move(slice(0, start), slice(start, stop), z)
        rounding.walk(z, start, start, stop=stop)
    return rounding.codes


class _Rounding:
    """One run of `gptq`: a class because a recursive closure keeps its arrays alive until Python looks for cycles."""

    def __init__(self, weight: torch.Tensor, units: torch.Tensor, factor: Factor, *, qmax: int) -> None:
        self.weight, self.units, self.factor, self.qmax = weight, units, factor, qmax
        self.codes, self.error = torch.empty_like(weight), torch.empty_like(weight)  # error: w - q

    def move(self, done: slice, todo: slice, z: torch.Tensor) -> None:
        """Move the errors of finished columns onto others."""
        z.addmm_(self.factor.unit_columns(done, todo).T, self.error[done])

    def walk(self, z: torch.Tensor, base: int, start: int, *, stop: int) -> None:
        """Round columns [start, stop); z holds them from `base` on, with all errors before `start` moved in."""
        if stop - start > LEAF:
            middle = (start + stop) // 2
            self.walk(z, base, start, stop=middle)
            self.move(slice(start, middle), slice(middle, stop), z[middle - base : stop - base])
            self.walk(z, base, middle, stop=stop)
            return
        onto = self.factor.unit_columns(slice(start, stop), slice(start, stop))
        for column in range(start, stop):
            k, value, one = column - start, z[column - base], self.units[column]
            if k:
                value += onto[:k, k] @ self.error[start:column]
            codes = torch.div(value, one, out=self.codes[column]).round_().clamp_(-self.qmax, self.qmax)
            torch.addcmul(self.weight[column], codes, one, value=-1, out=self.error[column])
