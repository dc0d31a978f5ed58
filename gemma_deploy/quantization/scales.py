"""Scales of symmetric codes: one per row, or one per row and group of columns."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from gemma_deploy.quantization.rtn import row_scales

SEARCHED_QMAX = 7  # clipping pays with few codes only: at 8 bits the best factor is 1 for nearly every row
# What absmax / qmax is multiplied by. 1 stands first: it wins where others are as good (zeros), and it is exact, so
# that weights which were made of such codes get their scale back. Their number is a power of two.
FACTORS = (1.0, *(1 + 0.018 * step for step in range(-26, 6) if step))
LEVELS = 4096  # of a group's magnitudes, in the search alone: what it finds loses 0.0003 % more than with all digits
VALUES_AT_ONCE = 1 << 18  # so that what is made of them stays in a core's own cache


def choose_scales(
    weight: torch.Tensor,
    qmax: int,
    groupsize: int | None = None,
    *,
    power: torch.Tensor | None = None,
    dtype: str = "float32",
) -> torch.Tensor:
    """Scales [rows, groups] float32.

    Args:
        weight: [rows, columns] float32.
        qmax: largest code. Up to `SEARCHED_QMAX` the scale is the one of least squared error among absmax / qmax
            times each of `FACTORS`.
        groupsize: divides the columns; None: one group.
        power: [columns] weights of the squared errors; equal when absent.
        dtype: the type that every scale is a number of.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, groupsize or columns)
    if qmax > SEARCHED_QMAX:
        largest = row_scales(grouped.abs().amax(2).reshape(-1), qmax).view(rows, -1)
        return as_dtype(largest, dtype)
    best = torch.empty(grouped.shape[:2])
    at_once = max(1, VALUES_AT_ONCE // columns)
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        best[part] = _searched(grouped[part], qmax, power)
    return as_dtype(best, dtype)


def _searched(grouped: torch.Tensor, qmax: int, power: torch.Tensor | None) -> torch.Tensor:
    """Scales [rows, groups] of least squared error for [rows, groups, groupsize].

    What a value loses at each factor depends only on its share of the largest of its group. It stands in a table, and
    a group's losses at all factors are a sum of rows of that table: one read for each value, where trying one factor
    after the other rounds and squares each value again and again.
    """
    shares = grouped.abs().reshape(-1, grouped.shape[2])
    absmax = shares.amax(1)
    shares.div_(absmax.masked_fill(absmax == 0, 1)[:, None]).mul_(LEVELS - 1).round_()
    weights = None if power is None else power.expand(len(grouped), -1).reshape(shares.shape)
    lost = functional.embedding_bag(
        shares.to(torch.int32), _squared_errors(qmax), mode="sum", per_sample_weights=weights
    )
    # Numbers that are not negative are ordered as their bits are: a factor's number in the last ones comes out with the
    # least loss, eight times as fast as from `argmin`.
    numbers = torch.arange(len(FACTORS), dtype=torch.int32)
    least = lost.view(torch.int32).bitwise_and_(-len(FACTORS)).bitwise_or_(numbers).amin(1) % len(FACTORS)
    return row_scales(absmax, qmax).mul_(torch.tensor(FACTORS)[least]).view(grouped.shape[:2])


@cache
def _squared_errors(qmax: int) -> torch.Tensor:
    """[LEVELS, factors] float32: (x - scale * code)^2 of x = level / (LEVELS - 1), scale = factor / qmax."""
    share = torch.linspace(0, 1, LEVELS, dtype=torch.float64)[:, None]
    scale = torch.tensor(FACTORS, dtype=torch.float64) / qmax
    codes = (share / scale).round_().clamp_max_(qmax)
    return (share - scale * codes).square_().float()


def as_dtype(scale: torch.Tensor, dtype: str) -> torch.Tensor:
    """The nearest numbers of a type, float32: a file of that type then holds what codes were chosen for.

    Those that round to zero are the type's smallest instead: of float16, whose range ends among small weights, one with
    few bits.
    """
    if dtype == "float32":
        return scale
    kind: torch.dtype = getattr(torch, dtype)
    limits = torch.finfo(kind)
    smallest = limits.smallest_normal * (limits.eps if dtype == "float16" else 1)
    return scale.clamp_min(smallest).to(kind).float()
