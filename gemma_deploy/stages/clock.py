"""Wall time, peak memory and bytes of each stage of a compile, for the console and the manifest.

Measures and tells, decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gemma_deploy.estimates import StageTiming
from gemma_deploy.machine import peak_rss_bytes, rss_bytes
from gemma_deploy.progress import Silent, Tick, Watcher, ticks


class StageClock:
    """Collects the timings of stages.

    Args:
        report: called with each stage when it ends.
        watcher: is told when a stage begins and how far it is.
    """

    def __init__(self, report: Callable[[StageTiming], None] | None = None, watcher: Watcher | None = None) -> None:
        self.report, self.watcher = report, watcher or Silent()
        self.done: list[StageTiming] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[StageTiming]:
        """Measure a block, whether it ends well or not; the block may set `bytes`, `skipped` and `note`."""
        timing, started, held = StageTiming(name), time.perf_counter(), rss_bytes()
        self.watcher.started(name)
        timing.failed = True
        try:
            yield timing
            timing.failed = False
        finally:
            timing.seconds = time.perf_counter() - started
            peak = peak_rss_bytes()
            timing.peak_rss_bytes = max(peak, (peak if timing.beside else held) + timing.child_rss_bytes)
            self.done.append(timing)
            self.watcher.ended(name)
            if self.report:
                self.report(timing)

    def ticks(self, stage: str, unit: str, *, of: float | None = None) -> Tick:
        """See `progress.ticks`."""
        return ticks(self.watcher, stage, unit, of=of)

    def with_those_before(self, before: Sequence[StageTiming]) -> list[StageTiming]:
        """What was done now, behind what an earlier run did of the other stages."""
        names = {timing.name for timing in self.done}
        return [*(timing for timing in before if timing.name not in names), *self.done]
