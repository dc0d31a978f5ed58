"""Artifacts that an engine in a Python of its own runs: it is asked for logits, a step at a time.

What it answers stands in the script of llama.cpp (gguf/apart/llama_reader.py): `begin`, `read`, `end` and `peak`.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.apart import Conversation
from gemma_deploy.backends.apart import Engine as Program
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.runtime.cached import PlainSession
from gemma_deploy.runtime.engine import Engine, Limits, Session
from gemma_deploy.runtime.sampling import Sampling
from gemma_deploy.runtime.speculative import Decider


class AskedSequence:
    """One sequence; see `Reader`. Logits lie in a file that both processes see: they are there until it reads on.

    Args:
        room: tokens there may be.
    """

    def __init__(self, model: AskedModel, room: int) -> None:
        self._model, self._number = model, next(model.numbers)
        file = model.conversation.folder / f"sequence-{self._number}.f32"
        rows = model.ask({"begin": self._number, "room": room, "out": str(file)})["rows"]
        self._logits = np.memmap(file, np.float32, "r", shape=(rows, model.vocab_size))
        self._ids: list[int] = []
        self.length = 0
        weakref.finalize(self, model.left.append, self._number)

    def ahead(self, wanted: int) -> int:
        """One: nobody guesses."""
        return 1

    def read(self, tokens: Sequence[int], top: int = 0) -> np.ndarray:
        """Read any number of tokens: [1, V] logits of the last."""
        return self._read(tokens, 1)

    def feed(self, tokens: Sequence[int], top: int = 0) -> np.ndarray:
        """Read a few tokens: [tokens, V] logits."""
        return self._read(tokens, len(tokens))

    def _read(self, tokens: Sequence[int], wanted: int) -> np.ndarray:
        whole = [*self._ids[: self.length], *map(int, tokens)]
        kept = self._model.ask(self._request(whole, self.length, wanted))["kept"]
        if kept != self.length:  # the window of a layer has moved on: what it needs is read again
            self._model.ask(self._request(whole, kept, wanted))
        self._ids, self.length = whole, len(whole)
        return self._logits[:wanted]

    def _request(self, whole: list[int], length: int, wanted: int) -> dict[str, object]:
        return {"read": self._number, "length": length, "ids": whole[length:], "wanted": wanted}


class AskedModel:
    """An artifact's model in another Python; see `Decider`.

    Args:
        program: that runs there; arguments: of its script.
    """

    near_tie, most_tokens = 0.0, 1

    def __init__(self, artifact: Artifact, program: Program, *arguments: str) -> None:
        started, contract = time.perf_counter(), artifact.manifest.contract
        self.path, self.stop_ids = artifact.path.resolve(), frozenset(artifact.manifest.model.eos_token_ids)
        self.context_length, self.vocab_size = contract.context, contract.vocab_size
        self.numbers, self.left = itertools.count(), deque[int]()  # of sequences; those that nobody holds any more
        self.ended, self._asking = False, threading.Lock()
        self.conversation = Conversation(program, program.name, self.path, *arguments)
        weakref.finalize(self, self.conversation.close)
        self.peak_bytes()  # it has loaded the model when it answers
        self.load_seconds = time.perf_counter() - started

    def ask(self, request: dict[str, object]) -> dict[str, Any]:
        """The answer to a request; from any thread.

        Raises:
            UsageError: the engine is not there. DeployError: it ended, and its sequences with it.
        """
        with self._asking:
            if self.ended:
                raise DeployError(
                    "the process that computed this text has ended", where=str(self.path), next_step="begin it again"
                )
            try:
                while self.left:
                    self.conversation.ask({"end": self.left.popleft()})
                return self.conversation.ask(request)
            except DeployError:
                self.ended = True
                raise

    def peak_bytes(self) -> int:
        """Peak RSS of its process."""
        return int(self.ask({"peak": True})["bytes"])

    def sequence(self, room: int) -> AskedSequence:
        """A new one; its cache is made for as many tokens."""
        return AskedSequence(self, room)


class AskedEngine(Engine):
    """An artifact in another Python.

    Attributes:
        program: that runs there.
    """

    program: Program
    _model: AskedModel | None = None

    @abstractmethod
    def arguments(self) -> Sequence[str]:
        """Of the script."""

    def check_runtime(self) -> None:
        """See `Engine`."""
        self.program.python()

    @property
    def limits(self) -> Limits:
        """See `Engine`: one token is left for the answer."""
        context = self.manifest.contract.context
        return Limits(context - 1, context)

    @property
    def load_seconds(self) -> float:
        """See `Engine`."""
        return 0.0 if self._model is None else self._model.load_seconds

    @property
    def apart_bytes(self) -> int:
        """See `Engine`."""
        return 0 if self._model is None else self._model.peak_bytes()

    def session(
        self,
        sampling: Sampling | None = None,
        *,
        max_length: int | None = None,
        endless: bool = False,
        lookup: bool = False,
        draft: Engine | None = None,
    ) -> Session:
        """See `Engine`."""
        if lookup or draft is not None:
            raise self._no_guesses("--lookup" if lookup else "--draft")
        with self._opening:
            if self._model is None or self._model.ended:
                self.check_runtime()
                self._model = AskedModel(self.artifact, self.program, *self.arguments())
            model = self._model
        return PlainSession(model, self.tokenizer, sampling, max_length=max_length, endless=endless)

    def decider(self) -> Decider:
        """See `Engine`.

        Raises:
            UsageError: always.
        """
        raise self._no_guesses("--draft")

    def _no_guesses(self, option: str) -> UsageError:
        return UsageError(
            f"{self.program.name} is asked for one token after the other: nobody guesses ahead",
            where=f"{self.path} ({option})",
            expected="an artifact of backend.type onnxruntime or native",
            next_step=f"compile it for native, or leave {option} out",
        )
