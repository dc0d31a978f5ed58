"""Second moments of a linear's inputs, their damping, and their factor: what error-compensated rounding runs on.

Everything happens inside one [columns, columns] array, the largest thing a quantizer holds: the factor goes into the
upper triangle while the strict lower one keeps the moments, so that a failed factorization can begin again and true
losses can be measured afterwards. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 512
DAMPING_STEP = 10.0
MOST_ATTEMPTS = 6


class NotPositiveError(Exception):
    """No damping that was tried made the moments positive definite."""


@dataclass
class Factor:
    """H + diag(damping) = R R^T with R upper triangular.

    Attributes:
        upper: [columns, columns]; its upper triangle is R, its strict lower one still H.
        diagonal: [columns] of H, undamped.
        damping: fraction of the diagonal that was added, after all attempts.
        attempts: factorizations that were needed.
    """

    upper: torch.Tensor
    diagonal: torch.Tensor
    damping: float
    attempts: int

    def unit_columns(self, rows: slice, columns: slice) -> torch.Tensor:
        """R[rows, columns] with each column divided by its diagonal element."""
        return self.upper[rows, columns] / self.upper.diagonal()[columns]

    @property
    def conditional_power(self) -> torch.Tensor:
        """[columns]: mean square of each input channel that the channels after it do not predict (D of U D U^T)."""
        return self.upper.diagonal().square()

    def energy(self, error: torch.Tensor) -> torch.Tensor:
        """error^T H error of each row with the undamped H: [columns, rows] -> [rows] float64."""
        total = torch.zeros(error.shape[1], dtype=torch.float64)
        for start in range(0, len(self.upper), BLOCK):
            block = slice(start, min(start + BLOCK, len(self.upper)))
            below = self.upper[block, : block.stop].tril(start - 1)  # strictly below the diagonal
            moved = below @ error[: block.stop]
            moved.mul_(2).addcmul_(error[block], self.diagonal[block, None])
            total += moved.mul_(error[block]).sum(0, dtype=torch.float64)
        return total


def factorize(moments: torch.Tensor, damping: float) -> Factor:
    """Factor `moments` in place.

    The damping is relative to each diagonal element (not to their mean), so that the result does not change when
    inputs and columns are scaled against each other: (H + d diag H) shrinks every correlation by 1 / (1 + d), which is
    also what a sample of few tokens wants. Channels below a millionth of the mean power, dead ones first of all, have
    that on the diagonal instead.

    Args:
        moments: [columns, columns] float32, symmetric; destroyed.
        damping: fraction of the diagonal added to it; raised tenfold each time the factorization fails.

    Raises:
        NotPositiveError: after `MOST_ATTEMPTS`.
    """
    diagonal = moments.diagonal().clone()
    floor = diagonal.mean().clamp_min(1e-30) * 1e-6  # of dead channels; a normal number even where all are dead
    for attempt in range(1, MOST_ATTEMPTS + 1):
        moments.diagonal().copy_(torch.maximum(diagonal * (1.0 + damping), floor))
        if _factorize(moments):
            return Factor(moments, diagonal, damping, attempt)
        _restore(moments)
        damping = max(damping, 1e-4) * DAMPING_STEP
    raise NotPositiveError


def _factorize(a: torch.Tensor) -> bool:
    """Upper triangle of a <- R with R R^T = a, from the last columns to the first; False where a is not positive."""
    for start in reversed(range(0, len(a), BLOCK)):
        block = slice(start, min(start + BLOCK, len(a)))
        if block.stop < len(a):
            after = slice(block.stop, None)
            update = a[: block.stop, after] @ a[block, after].T
            update[block].triu_()  # the strict lower triangle stays H
            a[: block.stop, block].sub_(update)
        square = a[block, block]
        mirrored = (square.triu() + square.triu(1).T).flip(0, 1)
        lower, info = torch.linalg.cholesky_ex(mirrored)
        if int(info) or not bool(torch.isfinite(lower).all()):
            return False
        r = lower.flip(0, 1)
        square.copy_(r + square.tril(-1))
        if start:
            above = a[:start, block]
            above.copy_(torch.linalg.solve_triangular(r.T, above, upper=False, left=False))
    return True


def _restore(a: torch.Tensor) -> None:
    """Upper triangle of a <- its lower one."""
    for start in range(0, len(a), BLOCK):
        block = slice(start, min(start + BLOCK, len(a)))
        a[:start, block] = a[block, :start].T
        square = a[block, block]
        square.copy_(square.tril() + square.tril(-1).T)
