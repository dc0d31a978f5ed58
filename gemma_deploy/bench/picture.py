"""The plot of a benchmark: speed over context length."""

from __future__ import annotations

from collections.abc import Mapping
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator, ScalarFormatter

    points = figures["contexts"]
    if not points:
        raise DeployError(
            "there is nothing to draw: no context length was measured",
            where=str(path),
            next_step="name some that the artifact has room for in --contexts",
        )
    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, key, title in zip(both, ("prefill_tok_s", "decode_tok_s"), ("prefill", "decode"), strict=True):
        drawn = [(point["tokens"], point[key]) for point in points if point[key] is not None]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), marker="o")
        axes.set(title=title, xlabel="tokens of context", ylabel="tokens per second", xscale="log")
        axes.set_xticks([point["tokens"] for point in points])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{figures['artifact']}, {figures['threads']} threads, medians of {figures['repeat']}")
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
