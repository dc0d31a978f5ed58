"""One stage of a divided artifact, on a node."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

import numpy as np

from gemma_deploy.artifact.watch import Watch
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import DeployError
from gemma_deploy.serve.cluster.node import Wanted, here, node_name, opened_here
from gemma_deploy.serve.request import LostError

Arrays = dict[str, np.ndarray]
CALLS = 3  # of an actor at a time: one that computes, `alive` and `ping`


class StageActor:
    """The actor; see `Stage`. What is refused is an answer, so that it comes back whole, and passes through stages."""

    def open(self, wanted: Wanted, name: str) -> tuple[str, Collection[str]] | DeployError:
        """Open a stage: the node it is on, and its `takes`."""
        try:
            artifact = opened_here(wanted)
            self._stage = open_engine(artifact, threads=wanted.threads).stage(name)
            self._check = Watch(artifact).check
        except DeployError as error:
            return here(error)
        self._text = 0
        return node_name(), sorted(self._stage.takes)

    def alive(self) -> None:
        """Never answers: the call fails when the process ends."""
        threading.Event().wait()

    def ping(self) -> None:
        """Answers at once, whatever is being computed."""

    def prefill(
        self, given: Arrays, before: Mapping[str, np.ndarray] | DeployError, *, text: int, passing: Collection[str]
    ) -> Arrays | DeployError:
        """Read the prompts of a text.

        Args:
            given: what all stages get; before: what the stage before gave; text: its number.
        """
        if isinstance(before, DeployError):
            return before
        self._text = 0
        try:
            self._check()
            found = self._stage.prefill({**given, **before}, passing)
        except DeployError as error:
            return error
        self._text = text
        return found

    def step(
        self,
        given: Arrays,
        before: Mapping[str, np.ndarray] | DeployError,
        *,
        text: int,
        position: int,
        passing: Collection[str],
    ) -> Arrays | DeployError:
        """Go on with a text that has `position` slots of the cache; a stage with another text refuses."""
        if isinstance(before, DeployError):
            return before
        if self._text != text or self._stage.position != position:
            return LostError("a stage has lost the text: it has to be read again", next_step="send it again")
        try:
            self._check()
            return self._stage.step({**given, **before}, passing)
        except DeployError as error:
            self._text = 0
            return error
