"""Text several tokens a step: what somebody guesses is read together with the newest token, and the model decides.

Decoding reads every weight once a step whatever the number of tokens, so that a right guess costs little more than
nothing, and a wrong one changes no text. Who guesses is a `Guesser`: the text itself (lookup.py) or a smaller model
(draft.py).

Greedy text is that of one token a step. Kernels add in another order for several tokens than for one, and rounding to
int8 makes that visible (`NEAR_TIE`). Where the two largest logits lie closer together, the token is computed again on
its own, as decoding without guesses does. What MatMulNBits leaves in the cache still depends on the company a token
had, so that a near tie can end in another way; in fp32, and where the linears are integer products, the tokens are the
same.

Tokens that are drawn keep the model's distribution (Leviathan, Kalman and Matias 2023, arxiv.org/abs/2211.17192,
section 2.3): a guess x that was drawn from q is taken with probability min(1, p(x) / q(x)), and where it is not, the
token is drawn from max(0, p - q) instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gemma_deploy.errors import DeployError
from gemma_deploy.runtime.sampling import Chances, Largest, Row, Rows, Sampler, certain

MOST_TOKENS = 8  # in a step, the newest one and those guessed: of a model that does not say otherwise


@dataclass(frozen=True)
class Guess:
    """What may come next.

    Args:
        tokens: one after another; none where nothing is known.
        drawn_from: of each that was drawn at random, what it was drawn from; None: none was.
    """

    tokens: Sequence[int]
    drawn_from: Sequence[Chances] | None = None


class Guesser(Protocol):
    """Who guesses. It is told every token of the sequence, and how good its guesses were."""

    def prepare(self) -> None:
        """Read what there is so far: called when the model reads the prompt."""

    def append(self, token: int) -> None:
        """A token more in the sequence."""

    def guess(self, most: int) -> Guess:
        """What may come next, at most so many tokens."""

    def learn(self, guessed: int, right: int) -> None:
        """How many tokens of its last guess were right."""


class Decider(Protocol):
    """The model that decides.

    Attributes:
        path: of its artifact; stop_ids: tokens that end a text; context_length: positions there are.
        near_tie: largest logits closer than this are not told apart by several tokens in one step.
        most_tokens: in a step of those that look ahead.
    """

    path: Path
    near_tie: float
    most_tokens: int
    stop_ids: frozenset[int]
    context_length: int
    vocab_size: int

    def sequence(self, room: int) -> Reader:
        """A new one, of so many tokens at most."""


class Reader(Protocol):
    """A sequence of it.

    Attributes:
        length: tokens that count; it may be set back by as many as `ahead` gave, if these were more than one.
    """

    length: int

    def ahead(self, wanted: int) -> int:
        """Of so many tokens to read next, as many as can be taken back."""

    def read(self, tokens: Sequence[int], top: int = 0) -> Rows:
        """Read any number of tokens; logits of the last.

        Args:
            top: so many of the largest are enough, with those equal to the last of them; 0: all are wanted. All may be
                given whatever it says.
        """

    def feed(self, tokens: Sequence[int], top: int = 0) -> Rows:
        """Read a few tokens; logits of each; `top` as for `read`."""


class Speculative:
    """Decoding that looks ahead.

    Args:
        ids: the prompt, and what was before it; room: tokens there may be in all.
        guesser: which knows these tokens.
        sampler: draws the tokens; greedy by default.
        sequence: which has read some of them already, the last not among those; a new one by default.

    Attributes:
        ids: of the sequence, those that were said among them.
        steps: of the graph after the prompt; guessed, right: tokens that were fed ahead, and that were.
    """

    def __init__(
        self,
        model: Decider,
        ids: Sequence[int],
        room: int,
        *,
        guesser: Guesser,
        sampler: Sampler | None = None,
        sequence: Reader | None = None,
    ) -> None:
        self.model, self.ids, self.room, self.guesser = model, list(ids), room, guesser
        self.sampler = sampler if sampler is not None and sampler.temperature > 0 else None
        self.sequence = sequence if sequence is not None else model.sequence(room)
        self.steps = self.guessed = self.right = 0
        self._top = 1 if self.sampler is None else self.sampler.top

    def first(self) -> int:
        """Read the prompt and choose a token."""
        rows = self.sequence.read(self.ids[self.sequence.length :], self._top)
        self.guesser.prepare()
        return self._take(self._chosen(rows[-1]))

    def next(self) -> list[int]:
        """Tokens of one step, one at least."""
        start, newest = self.sequence.length, self.ids[-1]
        most = self.sequence.ahead(1 + max(0, min(self.model.most_tokens - 1, self.room - start - 2))) - 1
        guess = self.guesser.guess(most) if most else Guess(())
        fed = [newest, *guess.tokens]
        rows, taken = self.sequence.feed(fed, self._top), []
        self.steps += 1
        for place, row in enumerate(rows):
            last = place == len(guess.tokens)
            if self.sampler is None:
                token = self._largest(row, start + place, fed[place], certain=not guess.tokens)
            else:
                token = self._chosen(row) if last else self._accepted(row, guess, place)
            taken.append(self._take(token))
            if last or guess.tokens[place] != token or token in self.model.stop_ids:
                break
        self.sequence.length = start + len(taken)
        right = len(taken) - 1
        self.guessed, self.right = self.guessed + len(guess.tokens), self.right + right
        self.guesser.learn(len(guess.tokens), right)
        return taken

    def _largest(self, row: Row, position: int, read: int, *, certain: bool) -> int:
        """The token of the largest logit; computed again without company where the second is near."""
        token, lead = best_of(row, self.model.path)
        if not certain and lead < self.model.near_tie:
            self.sequence.length = position
            token, _ = best_of(self.sequence.feed([read])[-1], self.model.path)
            self.steps += 1
        return token

    def _chosen(self, row: Row) -> int:
        """The token after a place where nothing was guessed."""
        if self.sampler is None:
            return best_of(row, self.model.path)[0]
        return self.sampler.choose(row)

    def _accepted(self, row: Row, guess: Guess, place: int) -> int:
        """The token that was guessed, or another: together they are distributed as the model's own."""
        assert self.sampler is not None
        token, own = guess.tokens[place], self.sampler.chances(row)
        guessed = certain(token) if guess.drawn_from is None else guess.drawn_from[place]
        if self.sampler.happens(own.of(token) / guessed.of(token)):
            return token
        rest = own.less(guessed)
        return self.sampler.draw(
            rest if rest.weights.any() else own
        )  # nothing rests where they differ by rounding alone

    def _take(self, token: int) -> int:
        self.ids.append(token)
        self.guesser.append(token)
        return token


def best_of(logits: Row, where: Path) -> tuple[int, float]:
    """The token of the largest of logits [V], and by how much it is ahead of the second. Changes the logits.

    Of one that is known alone the lead is infinite: such rows come from models whose `near_tie` is 0.
    """
    if isinstance(logits, Largest):
        two = logits.logits[:2]
        return int(logits.ids[0]), float(two[0] - two[1]) if len(two) == 2 else float("inf")
    token = int(logits.argmax())
    largest = float(logits[token])
    if not np.isfinite(largest):
        raise DeployError(
            f"the model gave {largest} as its largest logit",
            where=str(where),
            next_step="run `gemma-deploy parity` on the artifact",
        )
    logits[token] = -np.inf
    return token, largest - float(logits.max())
