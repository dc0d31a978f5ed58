"""Pages from templates/: every value in them is escaped, a value that is missing is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from gemma_deploy.artifact.gate_rows import HEADINGS, LEGEND, Line, Result, gate_rows, headline
from gemma_deploy.tables import figure

TEMPLATES = Path(__file__).parent / "templates"
MEASURES = {
    "positions": "positions",
    "relative": "relative error",
    "kl_mean": "mean KL",
    "kl_max": "largest KL",
    "top1": "same first token",
    "overturned": "largest lead overturned",
    "ppl_delta": "perplexity change",
}

# Of an encoder, which has no logits.
ENCODER_MEASURES = {"positions": "positions", "relative": "relative error", "cosine_distance": "cosine distance"}


def measures_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
    """Keys of measured rows that are shown, and what they are called."""
    return ENCODER_MEASURES if any("cosine_distance" in row for row in rows) else MEASURES


def rendered(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: a file in templates/.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: str = environment.get_template(template).render(**values)
    return page.lstrip("\n")


def gate_values(result: Result, measures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the tables of a gate's result are made from."""
    return {
        "verdict": headline(result),
        "headings": HEADINGS,
        "gate": gate_rows(result.lines),
        "legend": _legend(result.lines),
        "measure_headings": ("compared", "tokens", *measures_of(measures).values()),
        "measures": [_measured(row, measures_of(measures)) for row in measures],
    }


def _legend(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Of the names that occur."""
    said = " ".join(line.comparison for line in lines).split()
    return [(name, meaning) for name, meaning in LEGEND.items() if name in said]


def _measured(row: Mapping[str, Any], shown: Mapping[str, str]) -> tuple[str, ...]:
    cells = (f"{value:.2%}" if key in ("top1", "ppl_delta") and value is not None else figure(value)
             for key in shown for value in [row.get(key)])  # fmt: skip
    return (f"{row.get('reference')} = {row.get('test')}", f"{row.get('case')} {row.get('phase')}", *cells)
