"""Plots of benchmarks: speed over context length, and what a server does with many requests at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_deploy.errors import DeployError

KINDS = (".png", ".svg", ".pdf")
DPI = 120


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Prefill and decode over the lengths that were measured.

    Args:
        figures: of `measure`.

    Raises:
        DeployError: none was.
    """
    points = figures["contexts"]
    if not points:
        raise DeployError(
            "there is nothing to draw: no context length was measured",
            where=str(path),
            next_step="name some that the artifact has room for in --contexts",
        )
    panels = {}
    for key, title in (("prefill_tok_s", "prefill"), ("decode_tok_s", "decode")):
        drawn = [(point["tokens"], point[key]) for point in points if point[key] is not None]
        panels[title, "tokens per second"] = {"": drawn}
    title = f"{figures['artifact']}, {figures['threads']} threads, medians of {figures['repeat']}"
    _save(panels, path, title=title, below="tokens of context")


def draw_server(figures: Mapping[str, Any], path: Path) -> None:
    """Throughput, first token and time a token over the requests at a time, a line for each pair of lengths.

    Args:
        figures: of `measure_server`.
    """
    panels: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for load in figures["loads"]:
        name = f"{load['input_tokens']} in, {load['output_tokens']} out"
        values = {
            ("throughput", "tokens per second"): load["output_tok_s"],
            ("time to the first token, 99 %", "ms"): load["ttft_ms"] and load["ttft_ms"]["p99"],
            ("time a token, median", "ms"): load["tpot_ms"] and load["tpot_ms"]["median"],
        }
        for panel, value in values.items():
            line = panels.setdefault(panel, {}).setdefault(name, [])
            if value is not None:
                line.append((load["concurrency"], value))
    _save(panels, path, title=f"{figures['model']} at {figures['server']}", below="requests at a time")


def _save(
    panels: Mapping[tuple[str, str], Mapping[str, Sequence[tuple[float, float]]]], path: Path, *, title: str, below: str
) -> None:
    """Draw panels beside each other.

    Args:
        panels: (title, unit) -> name of a line -> its points; below: what the points are over.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure, found = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, ((name, unit), lines) in zip(found, panels.items(), strict=True):
        for label, points in lines.items():
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(title=name, xlabel=below, ylabel=unit, xscale="log")
        axes.set_xticks(sorted({place for points in lines.values() for place, _ in points}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if any(lines) and any(lines.values()):
            axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
