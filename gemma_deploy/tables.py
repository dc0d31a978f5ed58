"""Tables and figures for people: as wide as the terminal, three digits, and whatever stands in them as it is."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LOG_WIDTH = 110  # of a file or a pipe, for which rich takes 80
LEAST_WIDTH = 10  # less is no terminal: with COLUMNS=0 rich prints nothing


def console(*, stderr: bool = False, log_width: int = LOG_WIDTH) -> Console:
    """A console of rich that takes no word for its own: a path may hold `[/b]` or `:bug:`.

    Args:
        stderr: print on standard error.
        log_width: of what is no terminal, unless the environment says COLUMNS.
    """
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, emoji=False)
    if made.width < LEAST_WIDTH or (not made.is_terminal and "COLUMNS" not in os.environ):
        made.width = log_width
    return made


def table_of(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", words: Sequence[str] = ()
) -> Table:
    """A table whose figures stay whole and on the right, while words go on in the next line where it is narrow.

    Args:
        rows: a cell for each heading; words: headings of columns that hold words, the first one's too.
    """
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for heading in headings:
        text = heading == headings[0] or heading in words
        table.add_column(heading, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def figure(value: float | None) -> str:
    """Three digits: `0.00128`, `41.8`, `1,230`, `8.12e-6`; whole numbers as they are; `none` for what is no number."""
    if value is None or not math.isfinite(value):
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    rounded = float(f"{value:.2e}")
    size = abs(rounded)
    if size >= 1e7 or 0 < size < 1e-4:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{rounded:.3g}" if size < 1000 else f"{rounded:,.0f}"
