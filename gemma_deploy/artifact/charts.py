"""Where the lines and bars of the report's pictures lie; templates/charts.html.j2 draws them.

The same for the same numbers. Coordinates are those of the picture's own box, which a browser scales to the width of
the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma_deploy.tables import figure

WIDTH, HEIGHT = 560.0, 280.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 12.0, 38.0
MOST_TICKS = 6
LEAST_SPAN = 1e-4  # of the largest value, or six digits would not tell ticks apart
ROW_HEIGHT, BAR_HEIGHT = 40.0, 12.0


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A measured value: where it lies, and its words."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    marks: tuple[Mark, ...]

    @property
    def points(self) -> str:
        """The points as the `points` of an SVG polyline: "x,y x,y ..."."""
        return " ".join(f"{mark.x:g},{mark.y:g}" for mark in self.marks)


@dataclass(frozen=True)
class Column:
    """A bar that stands on the axis."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Lines or columns over the layers of a model, or over something else that is counted.

    Args:
        label: what it shows, for those who do not see it; unit: of the values; across: what the x axis counts.
        x_ticks, y_ticks: of the axes; rule: a value that is marked across, with its words.
    """

    label: str
    unit: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...] = ()
    columns: tuple[Column, ...] = ()
    rule: Tick | None = None
    across: str = "layer"


@dataclass(frozen=True)
class Bar:
    """A bar that lies under its words."""

    y: float
    width: float
    name: str
    text: str


@dataclass(frozen=True)
class Bars:
    """Amounts below each other."""

    label: str
    height: float
    bars: tuple[Bar, ...]


def line_chart(
    values: Mapping[str, Mapping[int, float]],
    *,
    label: str,
    unit: str,
    log: bool = False,
    rule: tuple[float, str] | None = None,
    across: str = "layer",
) -> Chart:
    """Lines over layers.

    Args:
        values: name of a line -> layer -> finite value, above zero where `log`; at least one.
        rule: a value that is marked across, and its words.
        across: what is counted in the place of layers.
    """
    every = [value for line in values.values() for value in line.values()] + ([rule[0]] if rule else [])
    layers = [layer for line in values.values() for layer in line]
    y = _Axis(min(every), max(every), HEIGHT - BOTTOM, stop=TOP, log=log)
    x = _Axis(min(layers), max(layers), LEFT + 8, stop=WIDTH - RIGHT - 8, whole=True)
    series = tuple(
        Series(
            name,
            tuple(
                Mark(x.at(layer), y.at(value), f"{name}, {across} {layer}: {figure(value)} {unit}".rstrip())
                for layer, value in sorted(line.items())
            ),
        )
        for name, line in values.items()
    )
    marked = None if rule is None else Tick(y.at(rule[0]), rule[1])
    return Chart(label, unit, x.ticks(), y.ticks(), series=series, rule=marked, across=across)


def column_chart(values: Sequence[float], *, label: str, unit: str) -> Chart:
    """A column for each layer, from zero."""
    y = _Axis(0.0, max(*values, 0.0) or 1.0, HEIGHT - BOTTOM, stop=TOP)
    room = (WIDTH - LEFT - RIGHT) / len(values)
    x = _Axis(0, max(len(values) - 1, 1), LEFT + room / 2, stop=LEFT + room * (max(len(values), 2) - 0.5), whole=True)
    ground = y.at(0.0)
    columns = tuple(
        Column(
            round(x.at(layer) - 0.4 * room, 1),
            (top := y.at(max(value, 0.0))),
            round(0.8 * room, 1),
            round(ground - top, 1),
            f"layer {layer}: {figure(value)} {unit}",
        )
        for layer, value in enumerate(values)
    )
    return Chart(label, unit, x.ticks(), y.ticks(), columns=columns)


def bars(rows: Sequence[tuple[str, float, str]], *, label: str) -> Bars:
    """Amounts below each other: (name, amount, words)."""
    most = max(amount for _, amount, _ in rows) or 1.0
    placed = (
        Bar(ROW_HEIGHT * number, round((WIDTH - 2) * amount / most, 1), name, text)
        for number, (name, amount, text) in enumerate(rows)
    )
    return Bars(label, ROW_HEIGHT * len(rows), tuple(placed))


class _Axis:
    """Values to coordinates, `low` at `start` and `high` at `stop`; rounded out to ticks unless `whole`."""

    def __init__(
        self, low: float, high: float, start: float, *, stop: float, log: bool = False, whole: bool = False
    ) -> None:
        self._start, self._stop, self._log, self._whole = start, stop, log, whole
        self._low, self._high = (math.log10(low), math.log10(high)) if log else (low, high)
        span = max(self._high - self._low, LEAST_SPAN * max(abs(self._low), abs(self._high)))
        self._step = _step(span, whole=whole or log)
        if not whole:
            self._low = self._step * math.floor(self._low / self._step + 1e-9)
            self._high = self._step * math.ceil(self._high / self._step - 1e-9)
        if self._high == self._low:
            self._high = self._low + self._step

    def at(self, value: float) -> float:
        """The coordinate of a value on the picture, in pixels."""
        share = ((math.log10(value) if self._log else value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._stop - self._start), 1)

    def ticks(self) -> tuple[Tick, ...]:
        """Round values of the axis, where lines and labels are drawn."""
        first = math.ceil(self._low / self._step - 1e-9)
        last = math.floor(self._high / self._step + 1e-9)
        found = []
        for number in range(first, last + 1):
            value = number * self._step
            value = 10.0**value if self._log else value
            text = str(round(value)) if self._whole else f"{value:.6g}"
            found.append(Tick(self.at(value), text))
        return tuple(found)


def _step(span: float, *, whole: bool) -> float:
    """1, 2 or 5 times a power of ten, so that there are at most `MOST_TICKS`."""
    rough = span / MOST_TICKS
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return max(1.0, step) if whole else step
