"""What long work shows while it runs: a bar on a terminal, plain lines in a log. One renderer for every command.

Work tells a `Watcher` which stage begins, how far it is and in which unit, and when it ends; it knows no console.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from gemma_deploy.names import MIB

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Tick = Callable[[float, float], None]  # (done, all of it), in the unit that was named when it was made
BYTES = "MiB"  # the unit whose counts are bytes
LOG_SECONDS = 30.0  # between two lines of a log about the same stage
SHORT_SECONDS = 2.0  # a stage that is over by then has no line of its own in a log


class Watcher(Protocol):
    """Is told what happens."""

    def started(self, stage: str) -> None:
        """A stage begins; its name is the one in manifest and log."""

    def advanced(self, stage: str, done: float, total: float, *, unit: str) -> None:
        """So much of it is done: `done` of `total` in `unit` ("layers", "windows", "MiB": then counts are bytes)."""

    def said(self, stage: str, what: str) -> None:
        """What the stage is at, where nothing can be counted."""

    def ended(self, stage: str) -> None:
        """The stage is over, well or not."""


class Silent:
    """A `Watcher` that shows nothing."""

    def started(self, stage: str) -> None:
        """See `Watcher`."""

    def advanced(self, stage: str, done: float, total: float, *, unit: str) -> None:
        """See `Watcher`."""

    def said(self, stage: str, what: str) -> None:
        """See `Watcher`."""

    def ended(self, stage: str) -> None:
        """See `Watcher`."""


def ticks(watcher: Watcher, stage: str, unit: str, *, of: float | None = None) -> Tick:
    """A function to be called with (done, total).

    Args:
        of: show shares of so many instead, "layer 5 of 18" where the work itself counts windows.
    """

    def tick(done: float, total: float) -> None:
        if of is None:
            watcher.advanced(stage, done, total, unit=unit)
        elif total:
            watcher.advanced(stage, done * of / total, of, unit=unit)

    return tick


def watch_on(stream: TextIO) -> Watcher:
    """A bar where the stream is a terminal, else lines."""
    return Bars(stream) if stream.isatty() else Lines(stream)


def amount(done: float, total: float, unit: str) -> str:
    """`5 of 18 layers`, `64 of 270 MiB`."""
    if unit == BYTES:
        done, total = done / MIB, total / MIB
    return f"{int(done)} of {int(total)} {unit}"


class Report:
    """Tells a `Watcher` what one stage is at: in words, or how much of that is done."""

    def __init__(self, watcher: Watcher, stage: str) -> None:
        self._watcher, self._stage, self._what = watcher, stage, ""

    def __call__(self, what: str) -> None:
        """What is done from now on."""
        self._what = what
        self._watcher.said(self._stage, what)

    def ticks(self, unit: str) -> Tick:
        """A function to be called with (done, total) of it, in `unit`."""
        what = f", {self._what}" if self._what else ""
        return ticks(self._watcher, self._stage, f"{unit}{what}")


def counted(report: Callable[[str], None], unit: str) -> Tick | None:
    """`Report.ticks`, where the report can count; None where it takes words alone."""
    return report.ticks(unit) if isinstance(report, Report) else None


class Lines:
    """Lines for a log: one when a stage begins, one now and then while it takes time, none at its end.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._began = self._told = 0.0
        self._tenth = -1

    def started(self, stage: str) -> None:
        """See `Watcher`."""
        self._began = self._told = self._clock()
        self._tenth = 0
        self._write(f"{stage} ...")

    def advanced(self, stage: str, done: float, total: float, *, unit: str) -> None:
        """A line for every tenth, not before the stage has taken a while, and at least one in `LOG_SECONDS`."""
        now, tenth = self._clock(), int(10 * done / total) if total else 0
        if now - self._began < SHORT_SECONDS or done >= total:
            return
        if tenth > self._tenth or now - self._told >= LOG_SECONDS:
            self._tenth, self._told = tenth, now
            share = 100 * done / total if total else 0.0
            self._write(f"{stage}  {share:3.0f} %  {amount(done, total, unit)}")

    def said(self, stage: str, what: str) -> None:
        """See `Watcher`."""
        self._tenth, self._told = 0, self._clock()
        self._write(f"{stage}  {what}")

    def ended(self, stage: str) -> None:
        """See `Watcher`."""

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class Bars:
    """A line at the bottom of a terminal: the stage, a bar and what it counts, time left; gone when the stage ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def started(self, stage: str) -> None:
        """See `Watcher`."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.ended(stage)
        columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24)]
        columns += [TextColumn("{task.fields[what]}"), TimeElapsedColumn(), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
        self._task = self._bar.add_task(stage, total=None, what="")
        self._bar.start()

    def advanced(self, stage: str, done: float, total: float, *, unit: str) -> None:
        """See `Watcher`."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, what=amount(done, total, unit))

    def said(self, stage: str, what: str) -> None:
        """See `Watcher`."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, what=what)

    def ended(self, stage: str) -> None:
        """See `Watcher`."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


@contextmanager
def reported(stage: str, stream: TextIO | None = None) -> Iterator[Report]:
    """Show one piece of work, of steps that have names, on standard error."""
    watcher = watch_on(stream or sys.stderr)
    watcher.started(stage)
    try:
        yield Report(watcher, stage)
    finally:
        watcher.ended(stage)


@contextmanager
def shown(stage: str, unit: str, stream: TextIO | None = None) -> Iterator[Tick]:
    """Show one piece of work on standard error; gives the function to be called with (done, total)."""
    watcher = watch_on(stream or sys.stderr)
    watcher.started(stage)
    try:
        yield ticks(watcher, stage, unit)
    finally:
        watcher.ended(stage)
