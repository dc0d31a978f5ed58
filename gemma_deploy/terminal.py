"""What long work shows: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

from collections.abc import Callable

import click

MIB = 1 << 20


def progress_bar(what: str) -> Callable[[int, int], None]:
    """A bar on a terminal; plain lines, one per tenth, in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        seen = [-1]

        def line(done: int, total: int) -> None:
            tenth = 10 * done // max(total, 1)
            if tenth > seen[0] and total > 256 * MIB:
                seen[0] = tenth
                click.echo(f"{what}  {10 * tenth:3d} %  {done / MIB:.0f} of {total / MIB:.0f} MiB", err=True)

        return line
    bar = Progress(
        TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, transient=True
    )
    task = bar.add_task(what, total=None)
    bar.start()

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return update
