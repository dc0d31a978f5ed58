"""A session whose cache this process fills itself, and may set back: `CachedSession`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.draft import Draft
from gemma_deploy.runtime.generate import GenerationStats, check_context
from gemma_deploy.runtime.limits import check_tokens
from gemma_deploy.runtime.lookup import History
from gemma_deploy.runtime.sampling import Sampling
from gemma_deploy.runtime.sequence import Session
from gemma_deploy.runtime.speculative import Decider, Guesser, Reader, Speculative
from gemma_deploy.text import Tokenizer


class CachedSession(Session):
    """One sequence of a model, a token a step or several that are guessed ahead.

    Args:
        sampling: greedy by default.
        max_length: tokens there may be in all. The model's context by default.
        endless: no stop token ends a reply.
        lookup: guess ahead; greedy only.
        draft: a smaller model that guesses ahead, of the same tokens.

    Raises:
        UsageError: what is drawn at random cannot be looked up.
    """

    def __init__(
        self,
        model: Decider,
        tokenizer: Tokenizer,
        sampling: Sampling | None = None,
        *,
        max_length: int | None = None,
        endless: bool = False,
        lookup: bool = False,
        draft: Decider | None = None,
    ) -> None:
        super().__init__(tokenizer, model.path, () if endless else model.stop_ids)
        self._decider, self.lookup = model, lookup
        sampling = sampling if sampling is not None else Sampling()
        if lookup and sampling.temperature > 0:
            raise UsageError(
                f"temperature {sampling.temperature:g}: what is drawn at random cannot be looked up",
                where=str(model.path),
                next_step="decode greedily (temperature 0), or without lookup",
            )
        self._sampler = sampling.sampler()
        self.max_length = min(max_length or model.context_length, model.context_length)
        self._draft: Draft | None = None
        if draft is not None:
            self._draft = Draft(
                draft,
                self.max_length,
                vocab_size=model.vocab_size,
                sampler=self._sampler,
                most_tokens=model.most_tokens,
            )

    @abstractmethod
    def _new_sequence(self) -> Reader:
        """An empty one, of `max_length` tokens at most."""

    def _guesser(self) -> Guesser | None:
        """Who guesses what follows the sequence; None: nobody does."""
        if self._draft is not None:
            self._draft.follow(self._ids)
            return self._draft
        return History(self._ids, self._decider.most_tokens) if self.lookup else None

    def reset(self) -> None:
        """See `Session`."""
        self._ids: list[int] = []
        self._answer: Sequence[int] = ()  # of the last reply, as far as it came
        self._sequence = self._new_sequence()

    @property
    def ids(self) -> list[int]:
        """See `Session`."""
        return [*self._ids, *self._answer]

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """See `Session`."""
        self._admitted(ids)
        self._begin(ids, ())
        return np.array(self._sequence.read(self._ids[self._sequence.length :])[-1], np.float32)

    def _admit(self, ids: list[int]) -> int:
        check_context(len(ids), self.max_length, str(self.path), before=len(self.ids))
        check_tokens(ids, self._decider.vocab_size, "prompt")
        return len(ids)

    def _full(self) -> int | None:
        return self.max_length if len(self._ids) + len(self._answer) == self.max_length else None

    def _begin(self, ids: Sequence[int], answer: Sequence[int]) -> None:
        """Add tokens to the sequence; of a step that looked ahead, only what was said is kept."""
        self._ids, self._answer = [*self.ids, *ids], answer
        self._sequence.length = min(self._sequence.length, len(self._ids) - len(ids))

    def _steps(self, ids: list[int], stats: GenerationStats) -> Iterator[Sequence[int]]:
        self._begin(ids, stats.tokens)
        guesser = self._guesser()
        yield from self._one_by_one() if guesser is None else self._guessed(guesser, stats)

    def _one_by_one(self) -> Iterator[Sequence[int]]:
        sequence = self._sequence
        top = self._sampler.top
        rows = sequence.read(self._ids[sequence.length :], top)
        while True:
            token = self._sampler.choose(rows[-1])
            yield [token]
            rows = sequence.feed([token], top)

    def _guessed(self, guesser: Guesser, stats: GenerationStats) -> Iterator[Sequence[int]]:
        ahead = Speculative(
            self._decider, self._ids, self.max_length, guesser=guesser, sampler=self._sampler, sequence=self._sequence
        )
        yield [ahead.first()]
        while True:
            taken = ahead.next()
            stats.steps = ahead.steps
            yield taken


class PlainSession(CachedSession):
    """One sequence of a model that has nothing but its tokens; arguments as of `CachedSession`."""

    def __init__(self, model: Decider, tokenizer: Tokenizer, sampling: Sampling | None = None, **options: Any) -> None:
        super().__init__(model, tokenizer, sampling, **options)
        self.reset()

    def _new_sequence(self) -> Reader:
        return self._decider.sequence(self.max_length)
