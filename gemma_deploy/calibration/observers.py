"""Observers: statistics of the tensors they are shown. They know nothing of models, layers or files."""

from __future__ import annotations

import torch


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
        if self.count:
            low, high = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        self.minimum, self.maximum = low, high
        self.count += rows.shape[0]

    @property
    def channel_absmax(self) -> torch.Tensor:
        """[channels]: largest magnitude of each."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    @property
    def absmax(self) -> float:
        """Largest magnitude of all."""
        return float(self.channel_absmax.max())


class MomentObserver:
    """Mean of x x^T over all tokens: the Hessian of a linear's squared output error, up to a factor."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.total = torch.zeros(channels, channels)

    def update(self, x: torch.Tensor) -> None:
        """x: [..., channels]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.total.addmm_(rows.T, rows)
        self.count += rows.shape[0]

    def take(self) -> torch.Tensor:
        """[channels, channels] float32; the observer is empty afterwards, so that the array exists once."""
        moments, self.total = self.total.div_(max(self.count, 1)), torch.empty(0)
        return moments
