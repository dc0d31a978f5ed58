"""Replicas of an artifact on a cluster, in front of which one process answers over HTTP: `Replicas`.

A request goes to the replica that has the fewest, and among several such to one that has read its beginning before.
Where a replica dies, what it had said nothing of yet is computed by another one; what it had begun to say is refused,
since a text that goes on elsewhere might be another one. A new actor takes its place as soon as Ray has started it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gemma_deploy.errors import ChangedError, DeployError
from gemma_deploy.serve.cluster.node import Wanted
from gemma_deploy.serve.cluster.placing import Places
from gemma_deploy.serve.cluster.replica import News, Opened, Replica
from gemma_deploy.serve.opening import Limits
from gemma_deploy.serve.request import Began, Counts, Ended, Failed, LostError, Prepared, Request, check_request
from gemma_deploy.serve.worker import Actor, Deliver

log = logging.getLogger(__name__)
AGAIN_SECONDS = (1.0, 2.0, 5.0, 15.0)  # from one try to have a replica again to the next
SILENT_SECONDS = 30.0  # after which a replica that tells nothing, which it does each second, is taken for dead
BEGINNING = 32  # tokens by which a replica is known to have read a text's beginning
KEPT_BEGINNINGS = 1024
GAUGES = ("running", "waiting", "cache_bytes", "kept", "adapters", "held")  # of `Counts`: not of what is gone
SEND_AGAIN = "send it again in a moment"


@dataclass(eq=False)
class _Asked:
    """A request: its number and listener; began: whether anything was said of it; moved: to another replica once."""

    number: int
    request: Request
    listener: Any
    sent: float
    began: bool = False
    moved: bool = False
    left: bool = False


class _One:
    """A replica, from here.

    Attributes:
        opened: what it told of itself, None: it computes nothing now; why: that is for good.
        past: counts of its actors that died; given: requests that it was ever given.
    """

    def __init__(self, place: int) -> None:
        self.place, self.restarts, self.given = place, 0, 0
        self.actor: Any = None
        self.opened: Opened | None = None
        self.why: DeployError | None = None
        self.asked: dict[int, _Asked] = {}
        self.past = self.counts = Counts()
        self._read: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def knows(self, beginning: tuple[int, ...]) -> bool:
        """Whether it read such a text before."""
        return beginning in self._read

    def keep(self, beginning: tuple[int, ...]) -> None:
        """It reads one."""
        self._read[beginning] = None
        self._read.move_to_end(beginning)
        if len(self._read) > KEPT_BEGINNINGS:
            self._read.popitem(last=False)

    def died(self) -> list[_Asked]:
        """Its actor is no more: what it had to compute."""
        self.opened, lost = None, list(self.asked.values())
        self.past = _sum([self.past, replace(self.counts, **dict.fromkeys(GAUGES, 0))])
        self.asked, self.counts = {}, Counts()
        self._read.clear()
        return lost


class Replicas:
    """See the module; `Computing` says what the methods do. All but `stop` are called in the event loop.

    Args:
        places: where they lie, one each; wanted: what nodes must have; limits: how each computes.
        count: of replicas.

    Raises:
        DeployError: a node refuses, by name, or a replica does not start; none is left then.
    """

    def __init__(self, places: Places, wanted: Wanted, limits: Limits, *, count: int) -> None:
        self._places, self._wanted, self._limits = places, wanted, limits
        self._every = [_One(place) for place in range(count)]
        self._number, self._ending = 0, False
        self._where: dict[Any, tuple[_One, _Asked]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._deliver: Deliver | None = None
        try:
            first = self._open_all()
        except BaseException:
            places.close()
            raise
        self.context, self.vocabulary, self.together = first.context, first.vocabulary, first.together * count
        levels = {one.opened.level for one in self._every if one.opened is not None}
        if len(levels) > 1:
            log.warning(
                "the nodes' processors have kernels of different levels (%s): a request may be answered in other words "
                "by another replica",
                ", ".join(sorted(levels)),
            )

    def _open_all(self) -> Opened:
        import ray

        for one in self._every:
            one.actor = self._places.actor(Replica, one.place)
        refs = [one.actor.open.remote(self._wanted, self._limits) for one in self._every]
        problems: list[DeployError] = []
        for one, ref in zip(self._every, refs, strict=True):
            try:
                found = ray.get(ref)
            except ray.exceptions.RayError as error:
                raise self._places.error(error, f"replica {one.place} did not start") from error
            if isinstance(found, DeployError):
                problems.append(found)
            else:
                one.opened = found
                log.info("replica %d: %s", one.place, found.node)
        if problems:
            raise problems[0]
        assert self._every[0].opened is not None
        return self._every[0].opened

    @property
    def broken(self) -> DeployError | None:
        """See `Computing`: no replica is there."""
        if any(one.opened is not None for one in self._every):
            return None
        lasting = [one.why for one in self._every if one.why is not None]
        if len(lasting) == len(self._every):
            return lasting[0]
        return LostError("no replica is there to compute it: one is being started again", next_step=SEND_AGAIN)

    def start(self, deliver: Deliver) -> None:
        """See `Computing`."""
        self._deliver, self._loop = deliver, asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._follow(one)) for one in self._every]

    def submit(self, request: Request, listener: Any) -> None:
        """See `Computing`."""
        check_request(request, self.context, self.vocabulary)
        if (broken := self.broken) is not None:
            raise broken
        self._number += 1
        self._send(_Asked(self._number, request, listener, time.perf_counter()))

    def _send(self, asked: _Asked) -> None:
        """Give a request to the replica that has the fewest."""
        beginning = tuple(asked.request.ids[:BEGINNING])
        there = [one for one in self._every if one.opened is not None]
        one = min(there, key=lambda one: (len(one.asked), not one.knows(beginning), one.given))
        one.keep(beginning)
        one.given += 1
        guide = asked.request.guide
        one.asked[asked.number] = asked
        self._where[asked.listener] = one, asked
        one.actor.submit.remote(asked.number, replace(asked.request, guide=None), guide and guide.words)

    def cancel(self, listener: Any) -> None:
        """See `Computing`."""
        if (found := self._where.get(listener)) is not None:
            one, asked = found
            asked.left = True
            one.actor.cancel.remote(asked.number)

    async def _follow(self, one: _One) -> None:
        """Take what a replica tells, and have another in its place when it is gone."""
        import ray

        while not self._ending:
            try:
                async with asyncio.timeout(SILENT_SECONDS):
                    news: News = await one.actor.news.remote()
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.error("replica %d is gone: %s", one.place, _first_line(error))
                self._lose(one)
                await self._again(one)
                continue
            self._take(one, news)
            if isinstance(news.broken, ChangedError):
                log.error("replica %d computes no more: %s", one.place, news.broken)
                one.why = news.broken
                self._lose(one)
                self._places.end(one.actor)
                return
            if news.broken is not None:
                self._places.end(one.actor)  # the next call tells that it is gone

    def _take(self, one: _One, news: News) -> None:
        one.counts = news.counts
        found: list[tuple[Any, Any]] = []
        for number, event in news.events:
            if (asked := one.asked.get(number)) is None:
                continue
            asked.began = True
            if isinstance(event, Began):
                event = replace(event, begun=asked.sent + event.begun)
            if isinstance(event, Ended | Failed):
                del one.asked[number]
                self._where.pop(asked.listener, None)
            found.append((asked.listener, event))
        self._hand_out(found)

    def _lose(self, one: _One) -> None:
        """Have others compute what a dead replica had said nothing of, and refuse the rest."""
        found: list[tuple[Any, Any]] = []
        for asked in one.died():
            self._where.pop(asked.listener, None)
            if not asked.left and not asked.began and not asked.moved and self.broken is None:
                asked.moved = True
                self._send(asked)
                continue
            error = LostError("the replica that computed it is gone", next_step=SEND_AGAIN)
            found.append((asked.listener, Failed(error)))
        self._hand_out(found)

    async def _again(self, one: _One) -> None:
        """Start a replica in the place of a dead one, however long that takes."""
        import ray

        for tries in range(1 << 62):
            self._places.end(one.actor)
            one.actor = self._places.actor(Replica, one.place)
            try:
                found = await one.actor.open.remote(self._wanted, self._limits)
            except ray.exceptions.RayError as error:
                found = self._places.error(error, f"replica {one.place} did not start")
            if isinstance(found, Opened):
                one.opened, one.restarts = found, one.restarts + 1
                log.warning("replica %d is there again: %s", one.place, found.node)
                return
            log.error("replica %d: %s", one.place, found)
            await asyncio.sleep(AGAIN_SECONDS[min(tries, len(AGAIN_SECONDS) - 1)])

    def _hand_out(self, found: Sequence[tuple[Any, Any]]) -> None:
        if found and self._deliver is not None:
            self._deliver(found)

    def counts(self) -> Counts:
        """See `Computing`: of all replicas together."""
        return _sum([counts for one in self._every for counts in (one.past, one.counts)])

    def actors(self) -> Sequence[Actor]:
        """See `Computing`."""
        return [
            Actor(
                f"replica {one.place}",
                one.opened.node if one.opened else "",
                one.opened is not None,
                one.restarts,
                len(one.asked),
            )
            for one in self._every
        ]

    def prepare(self, adapter: str | Path) -> Prepared:
        """See `Computing`: there are no adapters; --cluster refuses them before."""
        raise AssertionError(adapter)  # pragma: no cover

    def load(self, prepared: Prepared) -> Future[int]:
        """See `prepare`."""
        raise AssertionError(prepared)  # pragma: no cover

    def unload(self, adapter: int) -> Future[int]:
        """See `prepare`."""
        raise AssertionError(adapter)  # pragma: no cover

    def stop(self) -> None:
        """See `Computing`; the actors end, and their places are free."""
        self._ending = True
        if self._tasks:
            done: Future[None] = Future()
            self._loop.call_soon_threadsafe(self._stop_tasks, done.set_result)
            done.result()
        self._places.close()

    def _stop_tasks(self, done: Callable[[None], None]) -> None:
        for task in self._tasks:
            task.cancel()
        error = DeployError("the server was ended", next_step="send it again")
        self._hand_out([(asked.listener, Failed(error)) for one in self._every for asked in one.asked.values()])
        done(None)


def _sum(counts: Sequence[Counts]) -> Counts:
    return Counts(**{field.name: sum(getattr(one, field.name) for one in counts) for field in fields(Counts)})


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or f"it has said nothing for {SILENT_SECONDS:g} s").splitlines()[0]
