"""Stage clock: wall time, peak memory and bytes of each stage of a compile, for the console and the manifest.

Imported by compile.py alone; measures, decides nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class Stage:
    """One finished stage. `peak_rss_bytes` is the highest the process has been up to its end."""

    name: str
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    bytes: int = 0
    skipped: bool = False
    note: str = ""


def peak_rss_bytes() -> int:
    """VmHWM of this process, mapped file pages included (0 where /proc is missing)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Stages:
    """Collects stages.

    Args:
        report: called with each stage when it ends.
    """

    def __init__(self, report: Callable[[Stage], None] | None = None) -> None:
        self.report = report
        self.done: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measure a block; the block may set `bytes`, `skipped` and `note`."""
        stage, started = Stage(name), time.perf_counter()
        yield stage
        stage.seconds = time.perf_counter() - started
        stage.peak_rss_bytes = peak_rss_bytes()
        self.done.append(stage)
        if self.report:
            self.report(stage)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data for the manifest."""
        return [asdict(stage) for stage in self.done]
