"""The thread that computes: requests come from any thread, events leave in batches, one a step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gemma_deploy.errors import ChangedError, DeployError, UsageError
from gemma_deploy.serve.request import Counts, Ended, Event, Failed, Prepared, Request, Scheduling, check_request

log = logging.getLogger(__name__)
Deliver = Callable[[Sequence[tuple[Any, Event]]], None]
SWITCH_SECONDS = 0.0005  # after which the thread that computes gets the interpreter from the one that writes answers
LOOK_SECONDS = 1.0  # from one look at the weights to the next while nothing is computed


@dataclass(frozen=True)
class Actor:
    """What computes on another machine.

    Args:
        node: where it is, "": nowhere now; up: whether it is there; restarts: how often another one took its place.
        requests: that it has to compute; None: it has no queue of its own.
    """

    name: str
    node: str
    up: bool
    restarts: int
    requests: int | None = None


class Computing(Protocol):
    """Who computes requests, wherever that is: requests come in, events are delivered.

    Attributes:
        context, vocabulary, together: see `Scheduling`.
    """

    context: int
    vocabulary: int
    together: int

    @property
    def broken(self) -> DeployError | None:
        """Why nothing is computed now; None: all is well."""

    def start(self, deliver: Deliver) -> None:
        """Begin.

        Args:
            deliver: called with what was given to `submit` for each event.
        """

    def submit(self, request: Request, listener: Any) -> None:
        """Ask for something; what comes of it is delivered with `listener`, the last of it `Ended` or `Failed`.

        Raises:
            UsageError: it cannot be answered; see `check_request`. DeployError: nothing is, now.
        """

    def cancel(self, listener: Any) -> None:
        """End a request with the next step. Nothing where it has ended."""

    def prepare(self, adapter: str | Path) -> Prepared:
        """See `Scheduling`; in the caller's thread."""

    def load(self, prepared: Prepared) -> Future[int]:
        """See `Scheduling`; between two steps.

        Raises:
            DeployError: nothing is computed any more.
        """

    def unload(self, adapter: int) -> Future[int]:
        """See `Scheduling`; behind all that was submitted before. Raises as `load`."""

    def counts(self) -> Counts:
        """As after the last step."""

    def actors(self) -> Sequence[Actor]:
        """What computes elsewhere; nothing where all is computed in this process."""

    def stop(self) -> None:
        """End with the step at hand; what is not answered fails."""


class Worker:
    """Computes what a scheduler decides, in a thread of its own; `Computing` says what the methods do.

    Args:
        scheduling: which nobody else calls from now on.
        check: called before each step, raises a `ChangedError` where there can be no more.
        actors: what computes elsewhere for it.
    """

    def __init__(
        self,
        scheduling: Scheduling,
        *,
        check: Callable[[], None] = lambda: None,
        actors: Callable[[], Sequence[Actor]] = tuple,
    ) -> None:
        self._scheduling, self._check, self.actors = scheduling, check, actors
        self.context, self.vocabulary, self.together = scheduling.context, scheduling.vocabulary, scheduling.together
        self._wake = threading.Condition()
        self._asked: list[tuple[Request, Any]] = []
        self._left: list[Any] = []
        self._changes: deque[tuple[Callable[[], int], Future[int]]] = deque()
        self._ending = False
        self._counts = scheduling.counts()
        self._broken: DeployError | None = None
        self._listeners: dict[int, Any] = {}  # of the thread alone
        self._thread = threading.Thread(target=self._work, name="gemma-deploy-engine", daemon=True)

    @property
    def broken(self) -> DeployError | None:
        """See `Computing`; for good."""
        return self._broken

    def start(self, deliver: Deliver) -> None:
        """See `Computing`; events are delivered in the thread, those of a step together."""
        self._deliver = deliver
        self._thread.start()

    def submit(self, request: Request, listener: Any) -> None:
        """See `Computing`; from any thread."""
        check_request(request, self.context, self.vocabulary)
        with self._wake:
            self._refuse_at_the_end()
            self._asked.append((request, listener))
            self._wake.notify()

    def _refuse_at_the_end(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._ending:
            raise DeployError("the server is ending", next_step="send it to another one")

    def cancel(self, listener: Any) -> None:
        """See `Computing`; from any thread."""
        with self._wake:
            self._left.append(listener)
            self._wake.notify()

    def prepare(self, adapter: str | Path) -> Prepared:
        """See `Computing`."""
        return self._scheduling.prepare(adapter)

    def load(self, prepared: Prepared) -> Future[int]:
        """See `Computing`."""
        return self._change(lambda: self._scheduling.load(prepared))

    def unload(self, adapter: int) -> Future[int]:
        """See `Computing`."""

        def unloaded() -> int:
            self._scheduling.unload(adapter)
            return adapter

        return self._change(unloaded)

    def _change(self, change: Callable[[], int]) -> Future[int]:
        future: Future[int] = Future()
        with self._wake:
            self._refuse_at_the_end()
            self._changes.append((change, future))
            self._wake.notify()
        return future

    def counts(self) -> Counts:
        """See `Computing`."""
        return self._counts

    def stop(self) -> None:
        """See `Computing`."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        try:
            while self._one():
                pass
            error = DeployError("the server was ended", next_step="send it again")
        except ChangedError as problem:
            log.error("nothing is computed any more: %s", problem)
            error = problem
        except BaseException as problem:  # a fault of this program: told to everybody, once
            log.exception("the engine's thread ended")
            error = DeployError(f"the engine ended: {type(problem).__name__}: {problem}", next_step="start it again")
        with self._wake:
            self._broken = error
            waiting, self._asked = [listener for _, listener in self._asked], []
        for _, future in self._changes:
            if not future.done():
                future.set_exception(error)
        self._deliver([(one, Failed(error)) for one in (*self._listeners.values(), *waiting)])
        self._listeners.clear()
        self._scheduling.close()

    def _make_change(self) -> None:
        change, future = self._changes[0]
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(change())
            except DeployError as error:
                future.set_exception(error)
        self._changes.popleft()

    def _one(self) -> bool:
        """One step; False where it was the last."""
        with self._wake:
            if not (self._asked or self._left or self._changes or self._ending) and self._scheduling.idle:
                self._wake.wait(LOOK_SECONDS)
            if self._ending:
                return False
            asked, self._asked = self._asked, []
            left, self._left = self._left, []
            changes = len(self._changes)
        self._check()
        found: list[tuple[Any, Event]] = []
        for request, listener in asked:
            try:
                self._listeners[self._scheduling.add(request)] = listener
            except UsageError as error:
                found.append((listener, Failed(error)))
        for _ in range(changes):
            self._make_change()
        gone = {id(one) for one in left}
        for number, listener in self._listeners.items():
            if id(listener) in gone:
                self._scheduling.cancel(number)
        for number, event in self._scheduling.step():
            last = isinstance(event, Ended | Failed)
            found.append((self._listeners.pop(number) if last else self._listeners[number], event))
        self._counts = self._scheduling.counts()
        if found:
            self._deliver(found)
        return True
