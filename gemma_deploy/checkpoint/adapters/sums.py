"""Weights with products of factors added while they are read: as peft's model computes, in float32.

Nothing is held but the factors in use. A product is computed in tiles of rows that lie at fixed places, so that a row
is the same bits whichever block is asked for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gemma_deploy.checkpoint.adapters.updates import LowRank, TokenRows
from gemma_deploy.checkpoint.source import Rows

TILE_BYTES = 2 << 20  # of a product that is computed at once; blocks of the parameter writer begin where tiles do
RANKS_AT_ONCE = 128  # above some 384 the library cuts the sum into pieces that depend on its threads
NORM_ROWS = 4096  # of a table at a time, where its channels' lengths are summed
CACHED_BYTES = 32 << 20  # of first factors


@dataclass(frozen=True)
class Computed:
    """Shape and dtype of what is computed."""

    shape: tuple[int, ...]
    dtype: str = "float32"


class FirstFactors:
    """The first factors (A) that were read last, as float32 [r, in]; threads share it."""

    def __init__(self, limit: int = CACHED_BYTES) -> None:
        """Nothing is read yet."""
        self._limit, self._lock = limit, threading.Lock()
        self._kept: OrderedDict[LowRank, np.ndarray] = OrderedDict()

    def of(self, update: LowRank) -> np.ndarray:
        """`update.a()`."""
        with self._lock:
            if update in self._kept:
                self._kept.move_to_end(update)
                return self._kept[update]
        found = update.a()
        with self._lock:
            self._kept[update] = found
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > self._limit:
                self._kept.popitem(last=False)
        return found


def tile_rows(width: int) -> int:
    """Rows of a tile; the same for every block of a weight."""
    return max(1, TILE_BYTES // (4 * width))


def multiplied(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """`b @ a`, float32; for one shape always the same bits.

    Args:
        b: [rows, r]; a: [r, in].
    """
    out = b[:, :RANKS_AT_ONCE] @ a[:RANKS_AT_ONCE]
    for at in range(RANKS_AT_ONCE, len(a), RANKS_AT_ONCE):
        out += b[:, at : at + RANKS_AT_ONCE] @ a[at : at + RANKS_AT_ONCE]
    return out


@dataclass(frozen=True)
class Step:
    """One product that is added: of one adapter to one tensor.

    Args:
        update: the factors; scaling: alpha / r times the adapter's weight.
    """

    update: LowRank
    scaling: float

    def scaled_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of `scaling * B`."""
        b = self.update.b_rows(start, stop)
        b *= np.float32(self.scaling)
        return b


@dataclass(frozen=True)
class Sum:
    """A weight and the products that are added to it, one adapter after the other.

    With a magnitude (DoRA) what has been summed so far is scaled, each row by `magnitude / length of (base + this
    product)`, of an embedding each channel: `DoraLinearLayer.forward` of peft, whose base result is the running one.
    """

    base: Rows
    steps: tuple[Step, ...]
    factors: FirstFactors

    @property
    def entry(self) -> Computed:
        """[out, in] float32."""
        return Computed(self.base.entry.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32; what overflows is found where it is stored."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._rows(start, stop)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        out = self.base.rows(start, stop)
        count, width = self.entry.shape
        tile = tile_rows(width)
        begin, end = start - start % tile, min(-(-stop // tile) * tile, count)
        pairs = [(self.factors.of(step.update), step.scaled_rows(begin, end)) for step in self.steps]
        for first in range(begin, end, tile):
            last = min(first + tile, count)
            asked = slice(max(first, start), min(last, stop))
            part = out[asked.start - start : asked.stop - start]
            base = part.copy() if self._lengths_count else part
            for step, (a, b) in zip(self.steps, pairs, strict=True):
                product = multiplied(b[first - begin : last - begin], a)
                product = product[asked.start - first : asked.stop - first]
                factor = self._factor(step, base, product, asked)
                part += product
                if factor is not None:
                    part *= factor
        return out

    def raw_rows(self, start: int, stop: int) -> np.ndarray:
        """The same: what is computed is stored as float32."""
        return self.rows(start, stop)

    @property
    def _lengths_count(self) -> bool:
        return any(step.update.magnitude is not None for step in self.steps)

    def _factor(self, step: Step, base: np.ndarray, product: np.ndarray, asked: slice) -> np.ndarray | None:
        """[rows, 1], or [1, channels] of an embedding; None without a magnitude."""
        magnitude = step.update.magnitude
        if magnitude is None:
            return None
        if step.update.embedding:
            return self._channels[step]
        squares = np.square(base + product, dtype=np.float64).sum(1)
        wanted = magnitude.whole().reshape(-1)[asked]
        return _quotient(wanted, squares)[:, None]

    @cached_property
    def _channels(self) -> Mapping[Step, np.ndarray]:
        """What each embedding's channels are scaled by, [1, channels]; takes reading the table once."""
        found = {}
        for step in self.steps:
            if step.update.magnitude is None:
                continue
            alone = Sum(self.base, (Step(replace(step.update, magnitude=None), step.scaling),), self.factors)
            squares = np.zeros(self.entry.shape[1])
            for start in range(0, self.entry.shape[0], NORM_ROWS):
                rows = alone.rows(start, min(start + NORM_ROWS, self.entry.shape[0]))
                squares += np.square(rows, dtype=np.float64).sum(0)
            found[step] = _quotient(step.update.magnitude.whole().reshape(-1), squares)[None]
        return found


def _quotient(magnitude: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """The magnitude over the length, float32; a length of zero gives no number, which is found where it is stored."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return magnitude / np.sqrt(squares).astype(np.float32)


@dataclass(frozen=True)
class WithRows:
    """A matrix of which some rows are others."""

    base: Rows
    update: TokenRows

    @property
    def entry(self) -> Computed:
        """[out, in] float32."""
        return Computed(self.base.entry.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32."""
        out = self.base.rows(start, stop)
        for at, row in enumerate(self.update.indices):
            if start <= row < stop:
                out[row - start] = self.update.stored.rows(at, at + 1)[0]
        return out

    def raw_rows(self, start: int, stop: int) -> np.ndarray:
        """The same: stored as float32."""
        return self.rows(start, stop)
