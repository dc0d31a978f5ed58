"""Stage clock: wall time, peak memory and bytes of each stage of a compile, for the console and the manifest.

Imported by compile.py alone; measures, decides nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from gemma_deploy.machine import peak_rss_bytes, rss_bytes

log = logging.getLogger(__name__)


@dataclass
class Stage:
    """One finished stage.

    Attributes:
        peak_rss_bytes: the highest the process has been up to its end, with what it held beside a child of its own.
        child_rss_bytes: the highest of a child process.
    """

    name: str
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    bytes: int = 0
    skipped: bool = False
    note: str = ""
    child_rss_bytes: int = 0


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
        stage, started, held = Stage(name), time.perf_counter(), rss_bytes()
        yield stage
        stage.seconds = time.perf_counter() - started
        stage.peak_rss_bytes = max(peak_rss_bytes(), held + stage.child_rss_bytes)
        self.done.append(stage)
        if self.report:
            self.report(stage)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data for the manifest."""
        return [asdict(stage) for stage in self.done]
