"""The thread that computes: requests come from any thread, events leave in batches, one a step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.serve.request import Counts, Ended, Event, Failed, Request, Scheduling, check_request

log = logging.getLogger(__name__)
Deliver = Callable[[Sequence[tuple[Any, Event]]], None]


class Worker:
    """Computes what a scheduler decides, in a thread of its own.

    Args:
        scheduling: which nobody else calls from now on.
        deliver: called in that thread after each step, with what was given to `submit` for each event.
    """

    def __init__(self, scheduling: Scheduling, deliver: Deliver) -> None:
        self._scheduling, self._deliver = scheduling, deliver
        self._wake = threading.Condition()
        self._asked: list[tuple[Request, Any]] = []
        self._left: list[Any] = []
        self._ending = False
        self._counts = scheduling.counts()
        self._broken: DeployError | None = None
        self._listeners: dict[int, Any] = {}  # of the thread alone
        self._thread = threading.Thread(target=self._work, name="gemma-deploy-engine", daemon=True)

    @property
    def broken(self) -> DeployError | None:
        """Why nothing is computed any more; None: all is well."""
        return self._broken

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, request: Request, listener: Any) -> None:
        """Ask for something; what comes of it is delivered with `listener`, the last of it `Ended` or `Failed`.

        Raises:
            UsageError: it cannot be answered; see `check_request`. DeployError: nothing is, any more.
        """
        check_request(request, self._scheduling.context, self._scheduling.vocabulary)
        with self._wake:
            if self._broken is not None:
                raise self._broken
            if self._ending:
                raise DeployError("the server is ending", next_step="send it to another one")
            self._asked.append((request, listener))
            self._wake.notify()

    def cancel(self, listener: Any) -> None:
        """End a request with the next step; from any thread. Nothing where it has ended."""
        with self._wake:
            self._left.append(listener)
            self._wake.notify()

    def counts(self) -> Counts:
        """As after the last step."""
        return self._counts

    def stop(self) -> None:
        """End with the step at hand; what is not answered fails."""
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
        except BaseException as problem:  # a fault of this program: told to everybody, once
            log.exception("the engine's thread ended")
            error = DeployError(f"the engine ended: {type(problem).__name__}: {problem}", next_step="start it again")
        with self._wake:
            self._broken = error
            waiting, self._asked = [listener for _, listener in self._asked], []
        self._deliver([(one, Failed(error)) for one in (*self._listeners.values(), *waiting)])
        self._listeners.clear()
        self._scheduling.close()

    def _one(self) -> bool:
        """One step; False where it was the last."""
        with self._wake:
            while not (self._asked or self._left or self._ending) and self._scheduling.idle:
                self._wake.wait()
            if self._ending:
                return False
            asked, self._asked = self._asked, []
            left, self._left = self._left, []
        found: list[tuple[Any, Event]] = []
        for request, listener in asked:
            try:
                self._listeners[self._scheduling.add(request)] = listener
            except UsageError as error:
                found.append((listener, Failed(error)))
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
