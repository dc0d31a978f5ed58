"""Calibrated quantization of the linears that read one input: factors, scales, codes, and the loss of each.

Arrays in, arrays and figures out; knows no model and no file. The codes of a row do not depend on other rows, so large
matrices go through in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gemma_deploy.quantization.equalize import column_factors, token_gains
from gemma_deploy.quantization.gptq import gptq
from gemma_deploy.quantization.moments import BLOCK, Factor, factorize
from gemma_deploy.quantization.scales import choose_scales
from gemma_deploy.schemes import LOW_RANK, ScaleDtype, is_kept

PIECE_ROWS = 1024  # of a matrix that tokens are multiplied with
PIECE_ELEMENTS = 1 << 23  # of a matrix at a time; a handful of float32 arrays of this size are alive


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    Args:
        bits: of a code, 8 or 4; symmetric, -128 and -8 are not used.
        groupsize: input channels that share a scale; None for one scale per row.
        percdamp: see `factorize`.
        act_order: round channels of large power first.
        blocksize: see `gptq`.
        equalize: choose column factors; else they are 1. powers_of_two: round them to such.
        compensate: move errors onto later columns (GPTQ); else round to nearest.
        activations: inputs are rounded to 8 bits as well, with a scale for each token.
        kept_w8: kinds of linears that have 8 bits whatever the others have; those of low rank have them, and whole
            rows, in any case.
        scales: the type that every scale is a number of.
    """

    bits: int = 8
    groupsize: int | None = None
    percdamp: float = 0.5
    act_order: bool = True
    blocksize: int = 128
    equalize: bool = True
    powers_of_two: bool = False
    compensate: bool = True
    activations: bool = False
    kept_w8: tuple[str, ...] = ()
    scales: ScaleDtype = "float32"

    def linear(self, reader: str) -> Settings:
        """Those of one linear, by its name within the layer."""
        if is_kept(reader, LOW_RANK):
            return replace(self, bits=8, groupsize=None)
        return replace(self, bits=8) if is_kept(reader, self.kept_w8) else self

    @property
    def qmax(self) -> int:
        """The largest code, 2**(bits - 1) - 1."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """One matrix: codes * scale is weight * factors.

    Attributes:
        codes: [rows, columns] int8; scale: [rows, groups] float32 (one group: the whole row).
        signal: mean square of the linear's output, summed over rows; loss: of its error; rtn_loss: of the error that
            rounding to nearest makes, without factors.
        rows_to_nearest: rows where rounding to nearest lost less, and was kept.
        activation_noise: what rounding the input adds to the output, relative to it: square over square, mean of the
            tokens; 0 where the input is not rounded.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    signal: float
    loss: float
    rtn_loss: float
    rows_to_nearest: int
    activation_noise: float = 0.0

    def dequantized(self) -> torch.Tensor:
        """[rows, columns] float32: the weight that the artifact applies."""
        rows, columns = self.codes.shape
        groups = self.codes.float().view(rows, self.scale.shape[1], -1)
        return groups.mul_(self.scale[..., None]).view(rows, columns)


@dataclass(frozen=True)
class Solved:
    """What came out for linears that read one input.

    Attributes:
        factors: [columns]; the input is divided by them, the weights were multiplied.
        damping: that was used; attempts: factorizations it took.
        dead: input channels that were zero in every token.
        equalized: False when the factors were given up because they lost more than they gained.
    """

    weights: tuple[QuantizedWeight, ...]
    factors: torch.Tensor
    damping: float
    attempts: int
    dead: int
    equalized: bool


@torch.inference_mode()
def solve(
    weights: Sequence[torch.Tensor],
    moments: torch.Tensor,
    settings: Settings,
    *,
    shared: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    own: Sequence[Settings] = (),
) -> Solved:
    """Quantize matrices that read the same input.

    Args:
        weights: [rows, columns] float32 each.
        moments: [columns, columns] float32, mean of x x^T over the calibration tokens; destroyed.
        shared: see `column_factors`.
        tokens: [tokens, columns] some of the inputs, where these are rounded as well.
        own: settings of each matrix, where their bits differ; those of all by default.

    Raises:
        NotPositiveError: the moments cannot be factored.
    """
    dead = int((moments.diagonal() == 0).sum())
    order = torch.arange(len(moments))
    if settings.act_order:
        order = moments.diagonal().argsort(descending=True, stable=True)
        _permute_(moments, order)
    factor = factorize(moments, settings.percdamp)
    ones = torch.ones(len(order))
    factors = ones
    if settings.equalize:
        power = _in_place(factor.conditional_power if settings.compensate else factor.diagonal, order)
        if tokens is not None:  # in the measure of the tokens' noise, where no single token outweighs the rest
            weighted = (tokens.square() * token_gains(weights, tokens)[:, None]).mean(0)
            power *= weighted / _in_place(factor.diagonal, order).clamp_min(1e-30)
        factors = column_factors(weights, power, shared, groupsize=settings.groupsize, tokens=tokens)
        if settings.powers_of_two:
            factors = factors.log2().round().exp2()
    each = own or [settings] * len(weights)
    solved = [_matrix(weight, factor, order, factors, one) for weight, one in zip(weights, each, strict=True)]
    equalized = settings.equalize
    if tokens is not None:  # factors may cost the weights more than they gain there: activations decide
        rounded = tokens / factors
        rounded -= round_tokens(rounded)
        solved = [replace(one, activation_noise=_relative(one, tokens / factors, rounded)) for one in solved]
    elif equalized and sum(one.loss for one in solved) > sum(one.rtn_loss for one in solved):
        factors, equalized = ones, False
        solved = [_matrix(weight, factor, order, factors, one) for weight, one in zip(weights, each, strict=True)]
    return Solved(tuple(solved), factors, factor.damping, factor.attempts, dead, equalized)


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    """Inputs [..., columns] rounded to 8 bits with a scale per token: absmax / 127, half to even."""
    scale = x.abs().amax(-1, keepdim=True) / 127.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).round_().mul_(scale)


def _relative(weight: QuantizedWeight, tokens: torch.Tensor, errors: torch.Tensor) -> float:
    """Mean over tokens of |W e|^2 / |W x|^2."""
    square, noise = torch.zeros(2, len(tokens))
    for codes, scale in zip(weight.codes.split(PIECE_ROWS), weight.scale.split(PIECE_ROWS), strict=True):
        part = replace(weight, codes=codes, scale=scale).dequantized().T
        square += (tokens @ part).square_().sum(1)
        noise += (errors @ part).square_().sum(1)
    return float((noise / square.clamp_min(1e-6 * float(square.mean()) + 1e-30)).double().mean())


def _matrix(
    weight: torch.Tensor, factor: Factor, order: torch.Tensor, factors: torch.Tensor, settings: Settings
) -> QuantizedWeight:
    """One matrix, some rows at a time."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    step = max(1, PIECE_ELEMENTS // weight.shape[1])
    scales, totals = [], torch.zeros(4, dtype=torch.float64)
    for part, out in zip(weight.split(step), codes.split(step), strict=True):
        chosen, scale, figures = _piece(part, factor, order, factors, settings)
        out[:, order] = chosen.T.to(torch.int8)
        scales.append(scale)
        totals += figures
    signal, loss, nearest, kept = totals.tolist()
    return QuantizedWeight(codes, torch.cat(scales), signal, loss, nearest, int(kept))


def _piece(
    weight: torch.Tensor, factor: Factor, order: torch.Tensor, factors: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [columns, rows] in the order of rounding, scales, and (signal, loss, loss to nearest, rows to nearest)."""
    qmax, ordered = settings.qmax, weight.T[order].contiguous()
    scale = choose_scales(
        weight * factors,
        qmax,
        settings.groupsize,
        power=_in_place(factor.diagonal, order) / factors**2,
        dtype=settings.scales,
    )
    units = _units(scale, order).div_(factors[order, None])
    codes, loss = _nearest(ordered, units, factor, qmax)
    kept = torch.zeros(())
    if settings.compensate:
        compensated = gptq(ordered, units, factor, qmax=qmax, blocksize=settings.blocksize)
        better = factor.energy(torch.addcmul(ordered, compensated, units, value=-1))
        worse = loss < better
        codes, loss, kept = torch.where(worse, codes, compensated), torch.minimum(loss, better), worse.sum()
    power = _in_place(factor.diagonal, order)
    plain = choose_scales(weight, qmax, settings.groupsize, power=power, dtype=settings.scales)
    nearest = _nearest(ordered, _units(plain, order), factor, qmax)[1]
    signal = factor.energy(ordered)
    return codes, scale, torch.stack([x.sum().double() for x in (signal, loss, nearest, kept)])


def _nearest(weight: torch.Tensor, units: torch.Tensor, factor: Factor, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes rounded to nearest [columns, rows], and the loss of each row."""
    codes = (weight / units).round_().clamp_(-qmax, qmax)
    return codes, factor.energy(torch.addcmul(weight, codes, units, value=-1))


def _units(scale: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[columns, rows]: scales [rows, groups] of the group each column lies in, in the order of rounding."""
    return scale.T[order // (len(order) // scale.shape[1])]


def _in_place(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Values in the order of rounding -> in the order of the columns."""
    return torch.empty_like(values).index_copy_(0, order, values)


def _permute_(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows and columns in a new order, a block of columns beside the array at a time."""
    for block in moments.split(BLOCK):
        block.copy_(block[:, order])
    for block in moments.split(BLOCK, 1):
        block.copy_(block[order])
    return moments
