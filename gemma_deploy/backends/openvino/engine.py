"""How artifacts of `backend.type: openvino` are run: in OpenVINO itself, a sequence to a request."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.openvino.model import State, compiled, open_model, require_openvino, with_wanted
from gemma_deploy.errors import UsageError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.names import OPENVINO_MODEL
from gemma_deploy.runtime.cached import PlainSession
from gemma_deploy.runtime.engine import Engine, Limits, Session
from gemma_deploy.runtime.sampling import Sampling

if TYPE_CHECKING:
    from gemma_deploy.parity.sources import LogitSource
    from gemma_deploy.runtime.speculative import Decider

KERNELS = ("shipped", "strict")


class OpenVinoSequence:
    """One sequence; see `Reader`. Logits are OpenVINO's memory: they are there until it reads on."""

    def __init__(self, model: Any) -> None:
        self._state = State(model)

    @property
    def length(self) -> int:
        """Tokens that count."""
        return self._state.length

    @length.setter
    def length(self, length: int) -> None:
        if length != self._state.length:
            self._state.cut(length)

    def ahead(self, wanted: int) -> int:
        """One: what is set back is copied."""
        return 1

    def read(self, tokens: Sequence[int], top: int = 0) -> np.ndarray:
        """Read any number of tokens: [1, V] logits of the last."""
        return self._state.step(tokens)

    def feed(self, tokens: Sequence[int], top: int = 0) -> np.ndarray:
        """Read a few tokens: [tokens, V] logits."""
        return self._state.step(tokens, len(tokens))


class OpenVinoModel:
    """An artifact's model, compiled; see `Decider`."""

    near_tie, most_tokens = 0.0, 1

    def __init__(self, artifact: Artifact, stop_ids: Collection[int], threads: int) -> None:
        require_openvino("an artifact of backend.type openvino")
        started, contract = time.perf_counter(), artifact.manifest.contract
        self.path, self.stop_ids = artifact.path.resolve(), frozenset(stop_ids)
        self._model = compiled(with_wanted(open_model(self.path / OPENVINO_MODEL)), threads=threads)
        self.context_length, self.vocab_size = contract.context, contract.vocab_size
        give_memory_back()  # what compiling took and freed
        self.load_seconds = time.perf_counter() - started

    def sequence(self, room: int) -> OpenVinoSequence:
        """A new one; its cache grows as it is read."""
        return OpenVinoSequence(self._model)


class OpenVinoEngine(Engine):
    """An artifact in OpenVINO."""

    runtime = "openvino"
    kernel_names: Sequence[str] = KERNELS

    def check_runtime(self) -> None:
        """See `Engine`."""
        require_openvino("an artifact of backend.type openvino")

    @functools.cached_property
    def _opened(self) -> OpenVinoModel:
        return OpenVinoModel(self.artifact, self.stop_ids, self.threads)

    @property
    def limits(self) -> Limits:
        """See `Engine`: the cache grows with the sequence, and one token is left for the answer."""
        context = self.manifest.contract.context
        return Limits(context - 1, context)

    @property
    def load_seconds(self) -> float:
        """See `Engine`."""
        opened = self.__dict__.get("_opened")
        return opened.load_seconds if opened is not None else 0.0

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
            model = self._opened
        return PlainSession(model, self.tokenizer, sampling, max_length=max_length, endless=endless)

    def decider(self) -> Decider:
        """See `Engine`.

        Raises:
            UsageError: always.
        """
        raise self._no_guesses("--draft")

    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """See `Engine`."""
        from gemma_deploy.backends.openvino.source import SHIPPED, STRICT, OpenVinoSource

        require_openvino("an artifact of backend.type openvino")
        chosen = STRICT if kernels == STRICT else SHIPPED
        file, size = Path(self.path) / OPENVINO_MODEL, self.manifest.model.hidden_size
        return OpenVinoSource(file, chosen, hidden_size=size, threads=self.threads)

    def _no_guesses(self, option: str) -> UsageError:
        return UsageError(
            "what OpenVINO keeps of a text is not set back, which guesses ahead take",
            where=f"{self.path} ({option})",
            expected="an artifact of backend.type onnxruntime or native",
            next_step=f"compile it for native, or leave {option} out",
        )
