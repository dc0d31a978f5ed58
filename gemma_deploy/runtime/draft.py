"""Guesses of a smaller model of the same vocabulary: `run --draft ARTIFACT`. Whatever computes it: see `Decider`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.sampling import Chances, Largest, Row, Sampler
from gemma_deploy.runtime.speculative import MOST_TOKENS, Decider, Guess, best_of

if TYPE_CHECKING:
    from gemma_deploy.runtime.engine import Engine

# A token of a smaller probability is the last that is guessed: behind it the next is hardly ever right.
LEAST_SURE = 0.4


class Drawing:
    """How tokens are guessed one after the other, and how many.

    Args:
        vocab_size: logits of the model that decides; rows that only one of both has are padding.
        sampler: how that model's tokens are drawn: guesses are drawn likewise.
        where: of the artifact that guesses, for messages.
        most_tokens: in a step of that model.
    """

    def __init__(self, *, vocab_size: int, sampler: Sampler, where: Path, most_tokens: int = MOST_TOKENS) -> None:
        self.vocab_size, self.sampler, self.where = vocab_size, sampler, where
        self._most = most_tokens - 1  # to guess
        self._ahead = MOST_TOKENS // 2  # tokens to guess next time

    def learn(self, guessed: int, right: int) -> None:
        """Guess one more next time where all were right, one less where they were not."""
        if guessed:
            self._ahead = min(self._most, self._ahead + 1) if right == guessed else max(1, self._ahead - 1)

    def _chosen(self, row: Row, drawn_from: list[Chances]) -> tuple[int, float]:
        """A token, and how probable it is to this model."""
        if isinstance(row, Largest):
            if self.sampler.temperature > 0:
                return self._drawn(row, drawn_from)
            return best_of(row, self.where)[0], float(np.exp(row.logits[0] - row.log_sum))
        if len(row) < self.vocab_size:
            row = np.concatenate([row, np.full(self.vocab_size - len(row), -np.inf, row.dtype)])
        row = row[: self.vocab_size]
        if self.sampler.temperature > 0:
            return self._drawn(row, drawn_from)
        others = float(np.exp(row - row.max()).sum(dtype=np.float64))
        return best_of(row, self.where)[0], 1 / others

    def _drawn(self, row: Row, drawn_from: list[Chances]) -> tuple[int, float]:
        chances = self.sampler.chances(row)
        token = self.sampler.draw(chances)
        drawn_from.append(chances)
        return token, chances.of(token)


class Draft(Drawing):
    """A model that guesses, and its own cache; a `Guesser`.

    It is told of every token, and reads it when it guesses next; what it guessed itself and what turned out to be right
    it has read already.

    Args:
        room: tokens there may be, at most; fewer where this model's context is shorter: it guesses no more then.
        vocab_size, sampler, most_tokens: of the model that decides, see `Drawing`.
    """

    def __init__(
        self, model: Decider, room: int, *, vocab_size: int, sampler: Sampler, most_tokens: int = MOST_TOKENS
    ) -> None:
        super().__init__(vocab_size=vocab_size, sampler=sampler, where=model.path, most_tokens=most_tokens)
        self.model, self.room = model, min(room, model.context_length)
        self._ids: list[int] = []
        # Rows that this model has more are cut off before anything is chosen: all are needed then.
        self._top = sampler.top if model.vocab_size <= vocab_size else 0
        self._begin_cache()

    def _begin_cache(self) -> None:
        self.sequence = self.model.sequence(self.room)
        self._read: list[int] = []  # what lies in the cache, guesses among it
        self._settled = 0  # how many of those were no guesses: buffers of a window cannot go back behind them

    def follow(self, ids: Sequence[int]) -> None:
        """Guess what comes behind these tokens, the next time."""
        self._ids = list(ids)

    def prepare(self) -> None:
        """Read the prompt; the last token comes with the first guess."""
        waiting = self._waiting()[:-1]
        if waiting and len(self._ids) <= self.room:
            self._settle(waiting)

    def append(self, token: int) -> None:
        """A token more."""
        self._ids.append(token)

    def guess(self, most: int) -> Guess:
        """What this model would say."""
        waiting = self._waiting()
        most = min(most, self._ahead, self.room - len(self._ids))
        if most < 1:
            return Guess(())
        # All but the last guess are read, and taken back where they are wrong.
        most = max(1, self.sequence.ahead(len(waiting) + most - 1) - len(waiting) + 1)
        tokens: list[int] = []
        drawn_from: list[Chances] = []
        row = self._settle(waiting)
        while True:
            token, sure = self._chosen(row, drawn_from)
            tokens.append(token)
            if len(tokens) == most or sure < LEAST_SURE or token in self.model.stop_ids:
                return Guess(tokens, drawn_from or None)
            row = self.sequence.feed([token], self._top)[-1]
            self._read.append(token)

    def _waiting(self) -> list[int]:
        """Tokens to be read, one at least; what was read and is not so is taken back."""
        count = len(self._read)
        if self._read != self._ids[:count] or count == len(self._ids):
            pairs = zip(self._read, self._ids[:-1], strict=False)
            count = next((at for at, (one, other) in enumerate(pairs) if one != other), min(count, len(self._ids) - 1))
            if count < self._settled:  # another text
                self._begin_cache()
                return [*self._ids]
            del self._read[count:]
            self.sequence.length = count
        return self._ids[count:]

    def _settle(self, waiting: list[int]) -> Row:
        """Read tokens that are no guesses; logits behind the last."""
        row = self.sequence.read(waiting, self._top)[-1]
        self._read += waiting
        self._settled = len(self._read)
        return row


def decider_for(draft: Engine, model: Engine, *, lookup: bool) -> Decider:
    """The model that guesses for another, opened, after a look at whether it can.

    Args:
        lookup: whether the text itself is to guess as well.

    Raises:
        UsageError: it cannot, or both are to guess. ArtifactError: a file of it is missing or damaged.
    """
    if lookup:
        raise UsageError(
            "lookup and a draft both guess what comes next", where=str(model.path), next_step="leave one of them out"
        )
    found = draft.decider()
    check_draft(draft, model)
    return found


def check_draft(draft: Engine, model: Engine) -> None:
    """See that one artifact's tokens are another's.

    Raises:
        UsageError: they are not.
    """
    ours, theirs = model.tokenizer.backend.get_vocab(), draft.tokenizer.backend.get_vocab()
    if ours == theirs:
        return
    odd = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    shown = ", ".join(
        f"{token[:40]!r} ({theirs.get(token, 'none')}, here {ours.get(token, 'none')})" for token in odd[:3]
    )
    raise UsageError(
        f"the vocabulary of the draft is another: {len(odd)} tokens have another id or none, such as {shown}",
        where=f"{draft.path} (--draft)",
        expected=f"a smaller Gemma with the tokenizer of {model.path}",
        next_step="compile one of the same generation, or leave --draft out",
    )
