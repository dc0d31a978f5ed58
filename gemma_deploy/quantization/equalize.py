"""Column factors that make codes fit better: w_ij s_j is rounded, what feeds column j is divided by s_j.

With one scale per row the noise of row i is proportional to max_j |w_ij| s_j, and it reaches the output through
inputs of power h_j / s_j^2. What rounding weights to nearest adds to the output is therefore proportional to

    sum_i max_j (w_ij s_j)^2 * sum_j h_j / s_j^2,

with a scale for each group of columns, the sum of such products over the groups. Where activations are rounded as well,
with one scale per token t, their noise adds

    mean_t g_t max_j (x_tj / s_j)^2 * sum_ij (w_ij s_j)^2

in the same unit (8 bits each), g_t being what an error at that token counts. The factors minimize the sum. AWQ
(arXiv:2306.00978) and SmoothQuant (arXiv:2211.10438) look for s_j = a power of the magnitudes on a grid of one number;
here every column is free. Dividing the input costs nothing where something before
it can absorb the factor: a norm's gain, or the rows of the linear that makes it, whose scales are free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

STEPS = 150
STEPS_OF_WEIGHTS = 75  # where activations are not rounded: within 0.1 % of the least noise, 600 steps find no less
RATE = 0.05
MOST_ROWS = 4096
# Value of an objective and its derivative by the logarithms of the factors, [columns] float64.
Objective = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


def column_factors(
    weights: Sequence[torch.Tensor],
    power: torch.Tensor,
    shared: torch.Tensor | None = None,
    *,
    steps: int | None = None,
    groupsize: int | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Factors [columns], their logarithms' mean 0.

    Args:
        weights: matrices [rows, columns] that read the same input.
        power: [columns] mean square of each input channel.
        shared: [columns] index of the factor each column uses, where one thing feeds several columns.
        steps: of the descent; None: as many as are known to be enough.
        groupsize: columns that share a scale; None for whole rows.
        tokens: [tokens, columns] some inputs, where they are rounded with a scale each; None where they are not.
    """
    magnitudes = torch.cat([_some_rows(weight).abs() for weight in weights])
    magnitudes = magnitudes[magnitudes.amax(1) > 0]
    if not len(magnitudes):
        return torch.ones_like(power)
    index = torch.arange(len(power)) if shared is None else shared
    objectives = [_weight_noise(magnitudes, power, groupsize)]
    if tokens is not None:
        objectives.append(_activation_noise(magnitudes, tokens, token_gains(weights, tokens)))
    best = _descend(objectives, index, steps or (STEPS_OF_WEIGHTS if tokens is None else STEPS))
    return (best - best.mean()).exp()[index]


def token_gains(weights: Sequence[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """[tokens], mean 1: the inverse of the output's square, so that errors are relative to what they change.

    A norm follows nearly every linear of a Gemma, and the few tokens with massive activations would outweigh the rest.
    """
    square = torch.zeros(len(tokens))
    for weight in weights:
        square += sum(((tokens @ part.T).square().sum(1) for part in weight.split(MOST_ROWS)), torch.zeros(len(tokens)))
    gains = 1 / square.clamp_min(1e-6 * float(square.mean()) + 1e-30)
    return gains / gains.mean()


def _weight_noise(magnitudes: torch.Tensor, power: torch.Tensor, groupsize: int | None) -> Objective:
    columns = len(power)
    grouped = magnitudes.view(len(magnitudes), -1, groupsize or columns)
    starts = torch.arange(grouped.shape[1]) * grouped.shape[2]
    h = power + 1e-12 * power.mean() + 1e-30
    scaled = torch.empty_like(grouped)

    def noise(s: torch.Tensor) -> tuple[float, torch.Tensor]:
        peak, at = torch.mul(grouped, s.view(1, *grouped.shape[1:]), out=scaled).max(2)
        peak, through = peak.double().square_(), (h / s.square()).double().view(len(starts), -1)
        of_groups = peak.sum(0), through.sum(1)
        # Derivative by log s: the column's share of the peaks, less its share of the noise that gets through.
        slope = torch.zeros(columns, dtype=torch.float64)
        slope.index_add_(0, (at + starts).view(-1), (2 * peak * of_groups[1]).view(-1))
        slope -= (2 * through * of_groups[0][:, None]).view(-1)
        return float((of_groups[0] * of_groups[1]).sum()), slope

    return noise


def _activation_noise(magnitudes: torch.Tensor, tokens: torch.Tensor, gains: torch.Tensor) -> Objective:
    energy, sizes = magnitudes.double().square().sum(0), tokens.abs()
    scaled, share = torch.empty_like(sizes), gains.double() / len(gains)

    def noise(s: torch.Tensor) -> tuple[float, torch.Tensor]:
        peak, at = torch.div(sizes, s, out=scaled).max(1)
        of_tokens, through = peak.double().square_() * share, energy * s.double().square()
        total, gain = float(of_tokens.sum()), float(through.sum())
        slope = 2 * through * total
        slope.index_add_(0, at, -2 * gain * of_tokens)
        return total * gain, slope

    return noise


def _descend(objectives: Sequence[Objective], index: torch.Tensor, steps: int) -> torch.Tensor:
    """Logarithms of the factors where the sum of the objectives was least. Adam (arXiv:1412.6980) on its logarithm."""
    logs = torch.zeros(int(index.max()) + 1)
    mean, square = torch.zeros_like(logs), torch.zeros_like(logs)
    best, best_value = logs.clone(), float("inf")
    for step in range(1, steps + 1):
        found = [objective(logs.exp()[index]) for objective in objectives]
        value = sum(one for one, _ in found)
        if value < best_value:
            best, best_value = logs.clone(), value
        relative = torch.stack([slope for _, slope in found]).sum(0) / max(value, 1e-300)
        slope = torch.zeros(len(logs), dtype=torch.float64).index_add_(0, index, relative).float()
        mean.mul_(0.9).add_(slope, alpha=0.1)
        square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        logs = logs - RATE * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return best


def _some_rows(weight: torch.Tensor) -> torch.Tensor:
    """All rows, or evenly spaced ones of a large matrix."""
    return weight[:: -(-len(weight) // MOST_ROWS)].float()
