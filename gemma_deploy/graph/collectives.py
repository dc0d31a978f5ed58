"""What a rank of a tensor-parallel graph does besides its share: lookups in its rows of the table, sums over all ranks.

`Vastai::AllReduce` returns the sum of what every rank gives, `Vastai::AllGather` all of it behind one another along the
last axis. Parameters keep the checkpoint's names: the wrappers' own level (`.partial.`, `.table.`) is left out of them.
"""

from __future__ import annotations

import torch
from torch import nn

LEVELS = (".partial.", ".table.")  # in names of the trace, for the one dot in the parameter file


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """X of this rank -> the sum over all ranks."""
    result: torch.Tensor = torch.onnx.ops.symbolic(
        "Vastai::AllReduce", (x,), {"op": "sum"}, dtype=x.dtype, shape=x.shape, version=1
    )
    return result


def all_gather(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """[..., n] of this rank -> [..., n * ranks]."""
    shape = (*x.shape[:-1], x.shape[-1] * ranks)
    result: torch.Tensor = torch.onnx.ops.symbolic(
        "Vastai::AllGather", (x,), {"axis": -1}, dtype=x.dtype, shape=shape, version=1
    )
    return result


def mean_over_ranks(x: torch.Tensor, *, ranks: int) -> torch.Tensor:
    """[..., n] of this rank -> [..., 1], the mean of what all ranks have; each has as many."""
    return all_reduce(x.mean(-1, keepdim=True) / ranks)


class ReducedLinear(nn.Module):
    """A linear of which a rank holds some columns.

    Args:
        partial: the rank's columns; in_float32: sum in float32, as partial sums may be larger than their sum.
    """

    def __init__(self, partial: nn.Module, in_float32: bool) -> None:
        super().__init__()
        self.partial, self.in_float32 = partial, in_float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, in / ranks] -> [batch, seq, out]."""
        return all_reduce(self.partial(x.float() if self.in_float32 else x)).to(x.dtype)


class RankEmbedding(nn.Module):
    """A table of which a rank holds some rows; tokens of other ranks give zeros.

    Args:
        table: embedding of `rows` rows, whose forward takes ids within them.
    """

    def __init__(self, table: nn.Module, rows: int) -> None:
        super().__init__()
        self.table, self.rows = table, rows
        self.register_buffer("first_row", torch.zeros(1, dtype=torch.int64))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [batch, seq] of the whole vocabulary -> [batch, seq, hidden]."""
        local = input_ids - self.first_row
        mine = (local >= 0) & (local < self.rows)
        found = self.table(torch.where(mine, local, torch.zeros_like(local)))
        return all_reduce(torch.where(mine[..., None], found, torch.zeros_like(found)))


class RankExperts(nn.Module):
    """Experts of which a rank holds some, whole.

    Args:
        partial: the rank's experts, which give nothing for a number behind their last; count: how many; in_float32: sum
            in float32.
    """

    def __init__(self, partial: nn.Module, count: int, *, in_float32: bool) -> None:
        super().__init__()
        self.partial, self.count, self.in_float32 = partial, count, in_float32
        self.register_buffer("first_row", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, hidden]; weights, experts: [batch, seq, chosen], of all ranks -> as x."""
        local = experts - self.first_row
        mine = (local >= 0) & (local < self.count)
        made = self.partial(x, weights, torch.where(mine, local, torch.full_like(local, self.count)))
        return all_reduce(made.float() if self.in_float32 else made).to(made.dtype)
