"""The right scheduler for an artifact that is open, and the thread that computes what it decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypedDict

from gemma_deploy.artifact.watch import Watch
from gemma_deploy.runtime.engine import Engine
from gemma_deploy.serve.request import Scheduling
from gemma_deploy.serve.scheduler import Scheduler
from gemma_deploy.serve.single import OneByOne
from gemma_deploy.serve.worker import Actor, Worker


class Limits(TypedDict):
    """What `scheduling_of` takes."""

    together: int
    queue: int
    context: int
    cache_bytes: int


def scheduling_of(
    engine: Engine, *, together: int = 16, queue: int = 256, context: int = 0, cache_bytes: int
) -> Scheduling:
    """Many texts at once where the back end computes many sequences in a step, else one after the other.

    Args:
        together: texts in a step; queue: requests that wait, at most; context: positions of a text, 0 for all.
        cache_bytes: of all keys and values together, at most; where texts come one by one each has its own.

    Raises:
        UsageError: what computes it is not installed. ArtifactError: a file is missing or damaged.
    """
    model = engine.many(cache_bytes)
    if model is None:
        engine.session(max_length=2)  # opens its graphs now: what has their names later may be another artifact's
        return OneByOne(engine, queue=queue, context=context)
    return Scheduler(model, together=together, queue=queue, context=context, packed=engine.packed_adapter)


class Elsewhere(Protocol):
    """What computes the steps of an engine on other machines."""

    def look(self) -> None:
        """Called before each step, and now and then where there is none."""

    def actors(self) -> Sequence[Actor]:
        """See `Computing`."""


def worker_of(engine: Engine, scheduling: Scheduling, elsewhere: Elsewhere | None = None) -> Worker:
    """The thread that computes what a scheduler of this engine decides, as long as nobody writes to its weights."""
    watch = Watch(engine.artifact).check
    if elsewhere is None:
        return Worker(scheduling, check=watch)

    def check() -> None:
        watch()
        elsewhere.look()

    return Worker(scheduling, check=check, actors=elsewhere.actors)
