"""The gate's result for people: a row for each line, and one sentence. One place for terminal, report and inspect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from gemma_deploy.tables import figure

HEADINGS = ("compared", "measure", "value", "limit", "verdict")
WORDS = ("compared", "measure", "verdict")
OK, FAILED = "ok", "FAILED"
# What the names of compared models mean.
LEGEND = {
    "hf": "the checkpoint in transformers' own class",
    "patched": "this program's modeling files; with the name of a scheme: with the weights of the artifact",
    "strict": "the artifact, computed exactly as its graphs say",
    "shipped": "the artifact with the kernels that the runtime chooses for speed",
    "peft": "PEFT's own model of the checkpoint and the adapter, nothing merged; with the name of a scheme: of the "
    "weights of the artifact",
    "merged": "the checkpoint with the adapter added to its weights, in transformers' own class",
    "weights": "what is stored, beside what the checkpoint holds",
}


class Line(Protocol):
    """A measured value, its limit and the verdict: `parity.gates.Line`, or a manifest's `LineRecord`."""

    @property
    def comparison(self) -> str: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def value(self) -> str | float | None: ...  # noqa: D102
    @property
    def limit(self) -> str | float | None: ...  # noqa: D102
    @property
    def passed(self) -> bool: ...  # noqa: D102


class Result(Protocol):
    """What a gate found: `parity.compare.ParityResult`, or a manifest's `GateRecord`."""

    @property
    def passed(self) -> bool: ...  # noqa: D102
    @property
    def lines(self) -> Sequence[Line]: ...  # noqa: D102


def at_least(name: str) -> bool:
    """Whether a measure of this name has to reach its limit, where others have to stay below it."""
    return name.startswith(("headroom", "lowest"))


def gate_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Cells under `HEADINGS`, three digits and a unit; what failed comes first."""
    rows: list[tuple[str, ...]] = []
    for line in sorted(lines, key=lambda line: line.passed):
        sign = ">=" if at_least(line.name) else "<="
        limit = f"{sign} {_with_unit(line.name, line.limit)}"
        value, verdict = _with_unit(line.name, line.value), OK if line.passed else FAILED
        rows.append((line.comparison, line.name.replace(" in dB", ""), value, limit, verdict))
    return rows


def headline(result: Result) -> str:
    """`passed, 11 gates; mean KL 0.00231 nats (limit 0.015)`, or how many failed."""
    lines = result.lines
    if not result.passed:
        failed = sum(not line.passed for line in lines)
        return f"FAILED, {failed} of {len(lines)} gates" if lines else "FAILED: nothing was compared"
    worst = max((line for line in lines if line.name == "mean KL"), key=lambda line: _number(line.value), default=None)
    count = f"{len(lines)} gate{'s' if len(lines) != 1 else ''}"
    if worst is None:
        return f"passed, {count}"
    value, limit = (_with_unit("mean KL", one) for one in (worst.value, worst.limit))
    return f"passed, {count}; mean KL {value} (limit {limit})"


def _with_unit(name: str, value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "no number"
    if name.startswith("perplexity change"):
        return f"{value:.2%}"
    if name == "mean KL":
        return f"{figure(value)} nats"
    if "SQNR" in name:
        return f"{figure(value)} dB"
    if name.startswith("headroom"):
        return f"{figure(value)} x"
    return figure(int(value) if float(value).is_integer() else value)


def _number(value: str | float | None) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
