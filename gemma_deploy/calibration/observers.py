"""Observers: statistics of the tensors they are shown. They know nothing of models, layers or files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MOMENT_BLOCK = 512  # rows of a matrix of moments made at a time


class RangeObserver:
    """Smallest and largest value of every channel, and with them the largest magnitude of the tensor."""

    def __init__(self) -> None:
        self.count = 0
        self.minimum = torch.empty(0)
        self.maximum = torch.empty(0)

    def update(self, x: torch.Tensor) -> None:
        """x: [..., channels]; the last dimension is the same in every call."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        low, high = torch.aminmax(rows, dim=0)
        self._widen(low, high, rows.shape[0])

    def merge(self, other: RangeObserver) -> None:
        """Add what another one has seen; the order does not matter."""
        self._widen(other.minimum, other.maximum, other.count)

    def _widen(self, low: torch.Tensor, high: torch.Tensor, count: int) -> None:
        if self.count:
            low, high = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        self.minimum, self.maximum = low, high
        self.count += count

    @property
    def channel_absmax(self) -> torch.Tensor:
        """[channels]: largest magnitude of each."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    @property
    def absmax(self) -> float:
        """Largest magnitude of all."""
        return float(self.channel_absmax.max())


class MomentObserver:
    """Mean of x x^T over all tokens: the Hessian of a linear's squared output error, up to a factor.

    What is added is x^T x of whole shards, block after block of its upper triangle, so that a sum is one array and its
    bits depend on the shards and their order alone.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.total = torch.zeros(channels, channels)

    def update(self, x: torch.Tensor) -> None:
        """x: [..., channels], a shard."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        for start in self.starts():
            self.add(start, moment_block(rows, start))
        self.count += rows.shape[0]

    def starts(self) -> range:
        """First rows of the blocks."""
        return range(0, len(self.total), MOMENT_BLOCK)

    def add(self, start: int, block: torch.Tensor) -> None:
        """block: as `moment_block` gives it. Blocks of other rows may be added at the same time by other threads."""
        self.total[start : start + MOMENT_BLOCK, start:].add_(block)

    def take(self) -> torch.Tensor:
        """[channels, channels] float32; the observer is empty afterwards, so that the array exists once."""
        moments, self.total = self.total.div_(max(self.count, 1)), torch.empty(0)
        for start in range(0, len(moments), MOMENT_BLOCK):
            stop = min(start + MOMENT_BLOCK, len(moments))
            square = moments[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            moments[stop:, start:stop] = moments[start:stop, stop:].T
        return moments


class TokenObserver:
    """Some tokens as they are: every `step`-th of all, so that what is kept does not depend on who looked at what.

    Args:
        total: tokens that will be shown; most: how many are kept at most.
    """

    def __init__(self, total: int, most: int) -> None:
        self.step = -(-total // most) | 1  # odd: windows are powers of two long, and their first tokens are alike
        self._kept: list[torch.Tensor] = []

    def kept(self, start: int, rows: torch.Tensor) -> torch.Tensor:
        """Those of rows [tokens, channels] to keep; the first of them is token `start` of all."""
        return rows[-start % self.step :: self.step].clone()

    def add(self, kept: torch.Tensor) -> None:
        """Add what `kept` gave for the tokens that follow."""
        self._kept.append(kept)

    def take(self) -> torch.Tensor:
        """[tokens, channels]; the observer is empty afterwards."""
        tokens, self._kept = torch.cat(self._kept), []
        return tokens


def moment_block(rows: torch.Tensor, start: int) -> torch.Tensor:
    """Rows [start, start + MOMENT_BLOCK) of x^T x, from column `start` on. rows: [tokens, channels] float32."""
    return rows[:, start : start + MOMENT_BLOCK].T @ rows[:, start:]


@contextmanager
def quick_products() -> Iterator[None]:
    """Let this process round the factors of float32 products to bfloat16 where its CPU has tiles for them (AMX).

    Sums stay float32. For what a quantizer sees alone: over thousands of tokens the roundings average out (correlations
    change by 1e-4), and a damping of half the diagonal is added to them. All threads see the switch.
    """
    if not torch.cpu.get_capabilities().get("amx_bf16"):
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
