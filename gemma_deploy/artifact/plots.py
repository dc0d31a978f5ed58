"""The report's pictures, as SVG inside the page: the same bytes for the same numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from gemma_deploy.calibration.points import LABELS, split_point
from gemma_deploy.params.table import ParamRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SQNR_GATE_DB = 38
FP16_MAX = 65504.0
Value = TypeVar("Value", float, float | None)


def sqnr_plot(rows: Sequence[ParamRow]) -> str:
    """SQNR of every quantized matrix over its layer, a line for each kind; empty when nothing was quantized.

    Args:
        rows: of the manifest's parameter table; of ranks, the lowest of a matrix counts.
    """
    kinds: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.sqnr_db is not None and ".layers." in row.name:
            _, _, layer, *module = row.name.split(".")
            line = kinds.setdefault(module[-2], {})
            line[int(layer)] = min(row.sqnr_db, line.get(int(layer), math.inf))
    if not kinds:
        return ""
    figure, axes = _figure("SQNR, dB")
    for name, values in kinds.items():
        axes.plot(*zip(*sorted(values.items()), strict=True), marker=".", linewidth=1, label=name)
    axes.axhline(SQNR_GATE_DB, color="grey", linestyle=":", linewidth=1)
    return _svg(figure)


def sensitivity_plot(losses: Sequence[float]) -> str:
    """What the model loses when one layer alone is quantized, a bar for each; empty when it was not measured.

    Args:
        losses: mean KL in nats a token, by layer.
    """
    if not losses:
        return ""
    figure, axes = _figure("mean KL, nats")
    axes.bar(range(len(losses)), [max(loss, 0.0) for loss in losses], label="this layer alone quantized")
    return _svg(figure)


def ranges_of(absmax: Mapping[str, Value]) -> dict[str, Value]:
    """Of all measured points those that are drawn: what linears read, and layers make."""
    return {point: value for point, value in absmax.items() if split_point(point)[0] is not None and _kind(point)}


def range_plot(absmax: Mapping[str, float | None]) -> str:
    """Largest magnitude of what linears read and layers make, over the layer; empty when nothing was measured.

    Args:
        absmax: `model.layers.N.KIND` -> largest magnitude, None where it was not finite; other points are left out.
    """
    kinds: dict[str, list[tuple[int, float]]] = {}
    for point, value in ranges_of(absmax).items():
        if value is None:  # it was NaN or infinite
            continue
        layer, _ = split_point(point)
        assert layer is not None
        kinds.setdefault(_kind(point), []).append((layer, value))
    if not kinds:
        return ""
    figure, axes = _figure("largest magnitude")
    for name in LABELS.values():
        if name in kinds:
            axes.plot(*zip(*sorted(kinds[name]), strict=True), marker=".", linewidth=1, label=name)
    axes.axhline(FP16_MAX, color="black", linestyle="--", linewidth=0.8, label="largest float16")
    axes.set_yscale("log")
    return _svg(figure)


def _kind(point: str) -> str:
    """How tables call it, empty of a point that is not drawn."""
    return LABELS.get(split_point(point)[1], "")


def _figure(quantity: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="layer", ylabel=quantity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _svg(figure: Figure) -> str:
    import matplotlib as mpl

    figure.axes[0].legend(fontsize=8, ncols=4)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "gemma-deploy"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
