"""Column factors that make one scale per row fit better: w_ij s_j is rounded, what feeds column j is divided by s_j.

With one scale per row the noise of row i is proportional to max_j |w_ij| s_j, and it reaches the output through
inputs of power h_j / s_j^2. The factors minimize the product

    sum_i max_j (w_ij s_j)^2 * sum_j h_j / s_j^2

which is what rounding to nearest adds to the output; with a scale for each group of columns, the sum of such products
over the groups. (AWQ, arXiv:2306.00978, looks for s_j = power of the mean
magnitude on a grid of one number; here every column is free.) Dividing the input costs nothing where something before
it can absorb the factor: a norm's gain, or the rows of the linear that makes it, whose scales are free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

STEPS = 150
RATE = 0.05
MOST_ROWS = 4096


def column_factors(
    weights: Sequence[torch.Tensor],
    power: torch.Tensor,
    shared: torch.Tensor | None = None,
    steps: int = STEPS,
    groupsize: int | None = None,
) -> torch.Tensor:
    """Factors [columns], their logarithms' mean 0.

    Args:
        weights: matrices [rows, columns] that read the same input.
        power: [columns] mean square of each input channel.
        shared: [columns] index of the factor each column uses, where one thing feeds several columns.
        groupsize: columns that share a scale; None for whole rows.
    """
    magnitudes = torch.cat([_some_rows(weight).abs() for weight in weights])
    magnitudes = magnitudes[magnitudes.amax(1) > 0]
    if not len(magnitudes):
        return torch.ones_like(power)
    columns = len(power)
    index = torch.arange(columns) if shared is None else shared
    magnitudes = magnitudes.view(len(magnitudes), -1, groupsize or columns)
    starts = torch.arange(magnitudes.shape[1]) * magnitudes.shape[2]
    h = power / power.mean().clamp_min(1e-30) + 1e-12
    logs = torch.zeros(int(index.max()) + 1)
    mean, square = torch.zeros_like(logs), torch.zeros_like(logs)
    best, best_value = logs.clone(), float("inf")
    scaled = torch.empty_like(magnitudes)
    for step in range(1, steps + 1):
        s = logs.exp()[index]
        peak, at = torch.mul(magnitudes, s.view(1, *magnitudes.shape[1:]), out=scaled).max(2)
        peak, noise = peak.double().square_(), (h / s.square()).double().view(len(starts), -1)
        of_groups = peak.sum(0), noise.sum(1)
        value = float((of_groups[0] * of_groups[1]).sum())
        if value < best_value:
            best, best_value = logs.clone(), value
        # Derivative of log value by log s: the column's share of the peaks, less its share of the noise.
        by_column = torch.zeros(columns, dtype=torch.float64)
        by_column.index_add_(0, (at + starts).view(-1), (peak * (of_groups[1] / value)).view(-1))
        by_column -= (noise * (of_groups[0] / value)[:, None]).view(-1)
        slope = torch.zeros(len(logs), dtype=torch.float64).index_add_(0, index, 2 * by_column).float()
        mean.mul_(0.9).add_(slope, alpha=0.1)  # Adam, arXiv:1412.6980
        square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        logs = logs - RATE * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return (best - best.mean()).exp()[index]


def _some_rows(weight: torch.Tensor) -> torch.Tensor:
    """All rows, or evenly spaced ones of a large matrix."""
    return weight[:: -(-len(weight) // MOST_ROWS)].float()
