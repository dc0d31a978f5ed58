"""Where tables are printed: as they are, whatever stands in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False, least_width: int = 0) -> Console:
    """A console of rich that takes no word for its own: a path may hold `[/b]` or `:bug:`.

    Args:
        stderr: print on standard error.
        least_width: of a terminal or a log that is narrower.
    """
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, emoji=False)
    made.width = max(least_width, made.width)
    return made
