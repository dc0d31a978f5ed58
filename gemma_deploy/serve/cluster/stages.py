"""The stages of a divided artifact on a cluster, an actor each: a chain that the server's thread drives.

Hidden states, and what else passes between stages, go from node to node through Ray and not through this process. Where
a stage dies, the text at hand is refused, for its keys and values are gone; the next one waits until Ray has started
the stage again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_deploy.errors import DeployError
from gemma_deploy.runtime.staged import Arrays
from gemma_deploy.serve.cluster.node import Wanted
from gemma_deploy.serve.cluster.placing import Places
from gemma_deploy.serve.cluster.stage import CALLS, StageActor
from gemma_deploy.serve.request import LostError
from gemma_deploy.serve.worker import Actor

log = logging.getLogger(__name__)
START_SECONDS = 60.0  # that a text waits for a stage that is being started
DEAD_SECONDS = 10.0  # in which Ray tells who has died
LOOK_SECONDS = 1.0
LONG_SECONDS = 5.0  # that a step takes, before stages are asked whether they are there
SILENT_SECONDS = 30.0  # after which a stage that does not answer is taken for dead
SEND_AGAIN = "send it again in a moment"


class _One:
    """A stage, from here.

    Attributes:
        opening: what its `open` will give, None: it is there; living: a call that fails when its process ends.
    """

    def __init__(self, place: int, name: str) -> None:
        self.place, self.name, self.restarts, self.node = place, name, -1, ""
        self.actor: Any = None
        self.opening: Any = None
        self.living: Any = None
        self.takes: Sequence[str] = ()


class Stages:
    """See the module, and `Chain`. One thread calls it.

    Args:
        places: where they lie, one each; wanted: what nodes must have; names: of the stages, in their order.

    Raises:
        DeployError: a node refuses, by name, or a stage does not start; none is left then.
    """

    def __init__(self, places: Places, wanted: Wanted, names: Sequence[str]) -> None:
        import ray

        self._ray, self._places, self._wanted = ray, places, wanted
        self._every = [_One(place, name) for place, name in enumerate(names)]
        self._text = self._position = 0
        self._looked = 0.0
        try:
            for one in self._every:
                self._begin(one)
            for one in self._every:
                self._opened(one, self._ray.get(one.opening))
        except ray.exceptions.RayError as error:
            places.close()
            raise places.error(error, "a stage did not start") from error
        except BaseException:
            places.close()
            raise

    def _begin(self, one: _One) -> None:
        """Have Ray start a stage."""
        one.actor = self._places.actor(StageActor, one.place, calls=CALLS)
        one.opening, one.living = one.actor.open.remote(self._wanted, one.name), one.actor.alive.remote()

    def _opened(self, one: _One, found: tuple[str, Sequence[str]] | DeployError) -> None:
        if isinstance(found, DeployError):
            raise found
        one.node, one.takes = found
        one.opening, one.restarts = None, one.restarts + 1
        log.log(logging.WARNING if one.restarts else logging.INFO, "stage %s: %s", one.name, one.node)

    def prefill(self, given: Arrays) -> np.ndarray:
        """See `Chain`; tried again where a stage turns out to have died before."""
        for tries in (1, 2):
            self._wait()
            self._text, self._position = self._text + 1, 0
            try:
                found = self._through("prefill", given)
            except LostError:
                if tries == 2:
                    raise
                continue
            break
        self._position = given["attention_mask"].shape[1]
        return found

    def step(self, given: Arrays) -> np.ndarray:
        """See `Chain`."""
        found = self._through("step", given, position=self._position)
        self._position += 1
        return found

    def _through(self, method: str, given: Arrays, **more: int) -> np.ndarray:
        """One call of every stage, each with what the one before gives."""
        passed: Any = {}
        for at, one in enumerate(self._every):
            passing = sorted({name for later in self._every[at + 1 :] for name in later.takes})
            mine = given if at == 0 else {name: value for name, value in given.items() if name != "input_ids"}
            call = getattr(one.actor, method)
            passed = call.remote(mine, passed, text=self._text, passing=passing, **more)
        try:
            while not self._ray.wait([passed], timeout=LONG_SECONDS)[0]:
                self._end_silent()
            found = self._ray.get(passed)
        except self._ray.exceptions.RayError as error:
            self._mend(DEAD_SECONDS)
            if all(one.opening is None for one in self._every):
                raise DeployError(f"a stage failed: {_last_line(error)}", next_step=SEND_AGAIN) from error
            raise LostError("a stage that computed it is gone", next_step=SEND_AGAIN) from error
        if isinstance(found, DeployError):
            raise found
        return np.asarray(found["logits"])

    def _end_silent(self) -> None:
        """End stages that have stopped to answer, as if they had died."""
        pings = [one.actor.ping.remote() for one in self._every]
        answered, _ = self._ray.wait(pings, num_returns=len(pings), timeout=SILENT_SECONDS)
        for one, ping in zip(self._every, pings, strict=True):
            if ping not in answered:
                log.error("stage %s has said nothing for %g s (%s)", one.name, SILENT_SECONDS, one.node)
                self._places.end(one.actor)

    def _mend(self, seconds: float) -> None:
        """Have stages started again that have died, as Ray knows within some seconds."""
        living = [one.living for one in self._every if one.opening is None]
        if not living:
            return
        dead, _ = self._ray.wait(living, num_returns=1, timeout=seconds)
        if dead:  # others too, as the case may be
            dead, _ = self._ray.wait(living, num_returns=len(living), timeout=0)
        for one in self._every:
            if one.living in dead:
                log.error("stage %s is gone (%s): it is started again", one.name, one.node)
                self._again(one)

    def _again(self, one: _One) -> None:
        one.node = ""
        self._places.end(one.actor)
        self._begin(one)

    def _wait(self) -> None:
        """See that all stages are there.

        Raises:
            LostError: one is not, within `START_SECONDS`.
        """
        end = time.monotonic() + START_SECONDS
        for one in self._every:
            if one.opening is None:
                continue
            ready, _ = self._ray.wait([one.opening], timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise LostError(f"stage {one.name} is being started again", next_step=SEND_AGAIN)
            try:
                self._opened(one, self._ray.get(one.opening))
            except (DeployError, self._ray.exceptions.RayError) as error:
                log.error("stage %s was not started: %s", one.name, error)
                self._again(one)
                raise LostError(f"stage {one.name} cannot be started yet", next_step=SEND_AGAIN) from error

    def look(self) -> None:
        """Notice a stage that has died while nothing was asked of it, or is there again; to be called now and then."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._mend(0)
        for one in self._every:
            if one.opening is not None and self._ray.wait([one.opening], timeout=0)[0]:
                with contextlib.suppress(DeployError, self._ray.exceptions.RayError):  # `_wait` tells, and goes on
                    self._opened(one, self._ray.get(one.opening))

    def actors(self) -> Sequence[Actor]:
        """See `Computing`; from any thread."""
        return [Actor(f"stage {one.name}", one.node, one.opening is None, max(0, one.restarts)) for one in self._every]


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
