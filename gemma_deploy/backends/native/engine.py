"""How artifacts of `backend.type: native` are run: in the library, through its C ABI."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model, library_path
from gemma_deploy.backends.onnxruntime.lookup import History
from gemma_deploy.backends.onnxruntime.speculative import Speculative
from gemma_deploy.errors import UsageError
from gemma_deploy.names import PARAMS
from gemma_deploy.runtime.engine import Engine, Limits, Session
from gemma_deploy.runtime.generate import GenerationStats, check_context
from gemma_deploy.runtime.limits import check_tokens
from gemma_deploy.runtime.sampling import Sampling

if TYPE_CHECKING:
    from gemma_deploy.parity.sources import LogitSource

CACHE_BYTES = 8 << 30  # of all sessions together, at most; pages are taken as they are needed
KERNELS = ("shipped", "strict")


class NativeSequence:
    """One sequence in the library; it may be set back by as many tokens as a step reads."""

    def __init__(self, model: Model) -> None:
        self._model, self._number, self._length = model, model.sequence(), 0

    def __del__(self) -> None:
        if getattr(self, "_number", 0):
            self._model.drop(self._number)

    @property
    def length(self) -> int:
        """Tokens that count."""
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        if length != self._length:
            self._model.rewind(self._number, length)
        self._length = length

    def ahead(self, wanted: int) -> int:
        """All: a window keeps a page more than it sees."""
        return wanted

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Read any number of tokens: [1, V] logits of the last."""
        return self._computed(tokens, 1)

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Read a few tokens: [tokens, V] logits, each with the bits that it has alone."""
        return self._computed(tokens, len(tokens))

    def _computed(self, tokens: Sequence[int], wanted: int) -> np.ndarray:
        logits = self._model.logits([(self._number, tokens, wanted)])
        self._length += len(tokens)
        return logits


class NativeSession(Session):
    """One sequence in the library.

    Args:
        lookup: guess ahead where the text repeats itself; greedy only.

    Raises:
        UsageError: what is drawn at random cannot be looked up.
    """

    near_tie = 0.0  # a token has the same logits in any company

    def __init__(
        self, engine: NativeEngine, model: Model, sampling: Sampling | None, *, endless: bool, lookup: bool
    ) -> None:
        super().__init__(engine.tokenizer, engine.path, () if endless else engine.stop_ids)
        sampling = sampling if sampling is not None else Sampling()
        if lookup and sampling.temperature > 0:
            raise UsageError(
                f"temperature {sampling.temperature:g}: what is drawn at random cannot be looked up",
                where=str(engine.path),
                next_step="decode greedily (temperature 0), or without lookup",
            )
        self._model, self._cache, self._lookup = model, NativeSequence(model), lookup
        self._sampler, self._context = sampling.sampler(), model.context
        self.reset()

    def reset(self) -> None:
        """See `Session`."""
        self._ids: list[int] = []
        self._answer: Sequence[int] = ()  # of the last reply, as far as it came
        self._cache.length = 0

    @property
    def ids(self) -> list[int]:
        """See `Session`."""
        return [*self._ids, *self._answer]

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """See `Session`."""
        self._admitted(ids)
        self._begin(ids, ())
        return self._next()

    def _admit(self, ids: list[int]) -> int:
        check_context(len(ids), self._context, str(self.path), before=len(self.ids))
        check_tokens(ids, self._model.vocabulary, "prompt")
        return len(ids)

    def _full(self) -> int | None:
        return self._context if len(self._ids) + len(self._answer) == self._context else None

    def _begin(self, ids: Sequence[int], answer: Sequence[int]) -> None:
        self._ids, self._answer = [*self.ids, *ids], answer
        self._cache.length = min(self._cache.length, len(self._ids) - len(ids))

    def _next(self) -> np.ndarray:
        """Read what the library does not have of the sequence: [V] logits behind it."""
        return self._cache.read(self.ids[self._cache.length :])[0]

    def _steps(self, ids: list[int], stats: GenerationStats) -> Iterator[Sequence[int]]:
        self._begin(ids, stats.tokens)
        if self._lookup:
            yield from self._looked_up(stats)
        while True:
            token = self._sampler(self._next()[None])[0]
            yield [token]
            if token in self.stop_ids:  # not of the sequence
                return

    def sequence(self, room: int) -> NativeSequence:
        """What the library has of it: there is no other for looking ahead."""
        return self._cache

    def _looked_up(self, stats: GenerationStats) -> Iterator[Sequence[int]]:
        ahead = Speculative(self, self._ids, self._context, guesser=History(self._ids), sequence=self._cache)
        yield [ahead.first()]
        while True:
            taken = ahead.next()
            stats.steps = ahead.steps
            yield taken


class NativeEngine(Engine):
    """An artifact in the library."""

    runtime = "native"
    kernel_names: Sequence[str] = KERNELS

    def __init__(self, artifact: Artifact, *, threads: int = 0) -> None:
        super().__init__(artifact, threads=threads)
        self._seconds = 0.0

    def check_runtime(self) -> None:
        """See `Engine`."""
        library_path()

    @functools.cached_property
    def _opened(self) -> Model:
        started = time.perf_counter()
        folder = self.path.resolve()
        model = Model(plan_in(folder), folder / PARAMS, threads=self.threads, cache_bytes=CACHE_BYTES)
        self._seconds = time.perf_counter() - started
        return model

    @property
    def limits(self) -> Limits:
        """See `Engine`: the cache grows with the sequence, and one token is left for the answer."""
        context = self.manifest.contract.context
        return Limits(context - 1, context)

    @property
    def load_seconds(self) -> float:
        """See `Engine`."""
        return self._seconds

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
        if draft is not None:
            raise UsageError(
                "artifacts of backend.type native take no draft yet",
                where=str(self.path),
                next_step="leave --draft out, or look ahead in the text itself (--lookup)",
            )
        with self._opening:
            model = self._opened
        return NativeSession(self, model, sampling, endless=endless, lookup=lookup)

    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """See `Engine`."""
        from gemma_deploy.backends.native.source import NativeSource

        return NativeSource(self.path, "strict" if kernels == "strict" else "shipped", threads=self.threads)
