"""A replica of an artifact, on a node: the scheduler and the thread that `serve` has anywhere, and the way to them.

The process that is asked over HTTP (replicas.py) hands in requests by numbers of its own, and fetches what comes of
them: whatever the steps since the last time have given.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemma_deploy.engine import open_engine
from gemma_deploy.errors import DeployError
from gemma_deploy.serve.cluster.node import Wanted, here, node_name, opened_here
from gemma_deploy.serve.guiding import Guide, Guides
from gemma_deploy.serve.opening import Limits, scheduling_of, worker_of
from gemma_deploy.serve.request import Began, Counts, Event, Failed, Request, Said
from gemma_deploy.serve.worker import SWITCH_SECONDS

LOOK_SECONDS = 1.0  # in which news are given where there are no events
KEPT_GRAMMARS = 8


@dataclass(frozen=True)
class Opened:
    """A replica that computes requests: where, and of what sizes (`Scheduling`); level: of its kernels."""

    node: str
    context: int
    vocabulary: int
    together: int
    level: str


@dataclass(frozen=True)
class News:
    """What a replica tells: events of requests by their numbers, its counts, and why it computes no more."""

    events: Sequence[tuple[int, Event]]
    counts: Counts
    broken: DeployError | None


class _Asked:
    """A request that is computed."""

    def __init__(self, number: int) -> None:
        self.number, self.came = number, time.perf_counter()


class Replica:
    """The actor; see the module. All methods are called in its event loop, `open` first."""

    async def open(self, wanted: Wanted, limits: Limits) -> Opened | DeployError:
        """Open the artifact; what is refused is an answer, so that it comes back whole."""
        sys.setswitchinterval(SWITCH_SECONDS)
        self._loop, self._there = asyncio.get_running_loop(), asyncio.Event()
        self._found: list[tuple[int, Event]] = []
        self._asked: dict[int, _Asked | None] = {}  # None: it is coming
        self._left: set[int] = set()  # those that are coming, and that nobody waits for
        self._lock, self._tasks = threading.Lock(), set[asyncio.Task[None]]()
        try:
            return await asyncio.to_thread(self._open, wanted, limits)
        except DeployError as error:
            return here(error)

    def _open(self, wanted: Wanted, limits: Limits) -> Opened:
        engine = open_engine(opened_here(wanted), threads=wanted.threads)
        scheduling = scheduling_of(engine, **limits)
        guides = Guides(engine.path, scheduling.vocabulary, engine.stop_ids)
        self._readers, self._guide = guides.readers, functools.lru_cache(KEPT_GRAMMARS)(guides.of_words)
        self._worker = worker_of(engine, scheduling)
        self._worker.start(self._deliver)
        return Opened(node_name(), scheduling.context, scheduling.vocabulary, scheduling.together, engine.level)

    async def submit(self, number: int, request: Request, words: str | None) -> None:
        """Have a request computed; `words`: the grammar that it follows, in the place of its guide."""
        self._asked[number] = None
        task = asyncio.create_task(self._submit(number, request, words))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _submit(self, number: int, request: Request, words: str | None) -> None:
        try:
            if words is not None:
                known: Guide = await self._loop.run_in_executor(self._readers, self._guide, words)
                request = replace(request, guide=known.copy())
            asked = self._asked[number] = _Asked(number)
            self._worker.submit(request, asked)
            if number in self._left:
                self._worker.cancel(asked)
        except DeployError as error:
            self._put([(number, Failed(error))])
        except Exception as problem:  # a fault of this program: an answer, for nobody else hears of it
            what = f"the replica failed: {type(problem).__name__}: {problem}"
            self._put([(number, Failed(DeployError(what, next_step="send it again")))])

    async def cancel(self, number: int) -> None:
        """End a request with the next step. Nothing where it has ended."""
        if number not in self._asked:
            return
        asked = self._asked[number]
        if asked is None:
            self._left.add(number)
        else:
            self._worker.cancel(asked)

    async def news(self) -> News:
        """What there is since the last time; waits for it, but not for long."""
        if not self._found:
            self._there.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._there.wait(), LOOK_SECONDS)
        with self._lock:
            found, self._found = self._found, []
        for number, event in found:
            if not isinstance(event, Began | Said):
                self._asked.pop(number, None)
                self._left.discard(number)
        return News(found, self._worker.counts(), self._worker.broken)

    def _deliver(self, found: Sequence[tuple[Any, Event]]) -> None:
        """In the thread that computes. Clocks of machines differ: seconds since the request came are told."""
        told: list[tuple[int, Event]] = []
        for asked, event in found:
            if isinstance(event, Began):
                event = replace(event, begun=event.begun - asked.came)
            told.append((asked.number, event))
        self._put(told)

    def _put(self, found: Sequence[tuple[int, Event]]) -> None:
        with self._lock:
            self._found += found
        self._loop.call_soon_threadsafe(self._there.set)
