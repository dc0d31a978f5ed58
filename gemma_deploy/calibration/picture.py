"""The picture and the table of a calibration's ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_deploy.calibration.points import LABELS, split_point
from gemma_deploy.calibration.store import Range
from gemma_deploy.names import FP16_MAX


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        outlier: absmax over the median channel's: what a per-tensor scale wastes.
        headroom: how many times the largest float16 is larger.
    """

    point: str
    absmax: float
    channel: int
    outlier: float
    headroom: float


def largest(ranges: Mapping[str, Range], per_kind: int) -> list[Row]:
    """The points with the largest values, `per_kind` of each kind, kinds in the order of `LABELS`."""
    rows = []
    for point, found in ranges.items():
        channels = found.channel_absmax
        median = float(np.median(channels))
        absmax = found.absmax
        rows.append(
            Row(
                point,
                absmax,
                int(channels.argmax()),
                absmax / median if median else float("inf"),
                FP16_MAX / absmax if absmax else float("inf"),
            )
        )
    rows.sort(key=lambda row: (-row.absmax, row.point))
    return [row for kind in LABELS for row in [row for row in rows if _kind(row.point) == kind][:per_kind]]


def draw(ranges: Mapping[str, Range], title: str, file: Path) -> None:
    """Write a PNG: absmax of every layer (solid) and of its median channel (dotted), one colour for each kind."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for kind, label in LABELS.items():
        points = sorted((split_point(point)[0] or 0, found) for point, found in ranges.items() if _kind(point) == kind)
        layers = [layer for layer, _ in points]
        if kind == "lm_head.in":
            layers = [1 + max((split_point(point)[0] or 0) for point in ranges)] * len(points)
        line = axes.plot(layers, [found.absmax for _, found in points], marker="o", markersize=3, label=label)[0]
        medians = [float(np.median(found.channel_absmax)) for _, found in points]
        axes.plot(layers, medians, ":", marker=".", markersize=3, color=line.get_color())
    axes.axhline(FP16_MAX, color="black", linewidth=0.8, linestyle="--", label="largest float16")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("largest magnitude (dotted: of the median channel)")
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(fontsize="small", ncols=4, loc="outside lower center")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120, metadata={"Software": "gemma-deploy"})


def _kind(point: str) -> str:
    return split_point(point)[1]
