"""Scales of symmetric codes: one per row, or one per row and group of columns."""

from __future__ import annotations

import torch

from gemma_deploy.quantization.rtn import row_scales

SEARCHED_QMAX = 7  # clipping pays with few codes only: at 8 bits the best shrink factor is 1 for nearly every row
SHRINK = torch.linspace(1.0, 0.55, 19).tolist()


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
        qmax: largest code. Up to `SEARCHED_QMAX` the scale is the one of least squared error among shrunk ones.
        groupsize: divides the columns; None: one group.
        power: [columns] weights of the squared errors; equal when absent.
        dtype: the type that every scale is a number of.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, groupsize or columns)
    absmax = grouped.abs().amax(2)
    largest = row_scales(absmax.reshape(-1), qmax).view_as(absmax)
    if qmax > SEARCHED_QMAX:
        return as_dtype(largest, dtype)
    best, least = largest, torch.full_like(largest, float("inf"))
    codes, error = torch.empty_like(grouped), torch.empty_like(grouped)  # once: fresh pages cost as much as the work
    for shrink in SHRINK:
        scale = largest * shrink
        torch.div(grouped, scale[..., None], out=codes).round_().clamp_(-qmax, qmax)
        torch.addcmul(grouped, codes, scale[..., None], value=-1, out=error).square_()
        if power is not None:
            error.mul_(power.view(1, grouped.shape[1], -1))
        lost = error.sum(2)
        better = lost < least
        best, least = torch.where(better, scale, best), torch.where(better, lost, least)
    return as_dtype(best, dtype)


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
