"""Guesses from the text itself: `run --lookup`.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): what followed the last few tokens when they
occurred before.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemma_deploy.runtime.speculative import MOST_TOKENS, Guess

LONGEST, SHORTEST = 3, 2  # tokens that must have occurred before


class History:
    """The tokens so far, and what followed the last few of them before; a `Guesser`.

    Args:
        most_tokens: of a step, the newest one and those guessed.
    """

    def __init__(self, ids: Sequence[int], most_tokens: int = MOST_TOKENS) -> None:
        self._most = most_tokens - 1  # to guess
        self.ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # place behind the latest occurrence that something follows
        self._ahead = MOST_TOKENS // 2  # tokens to guess next time
        for token in ids:
            self.append(token)

    def prepare(self) -> None:
        """Nothing is to be read."""

    def append(self, token: int) -> None:
        """A token more."""
        for length in range(SHORTEST, LONGEST + 1):
            if len(self.ids) >= length:
                self._after[tuple(self.ids[-length:])] = len(self.ids)
        self.ids.append(token)

    def guess(self, most: int) -> Guess:
        """What may come next: none where the last tokens are new."""
        return Guess(self.followed(min(most, self._ahead)))

    def followed(self, most: int) -> list[int]:
        """What followed the last tokens before, the longest and then latest occurrence of them; at most so many."""
        for length in range(LONGEST, SHORTEST - 1, -1):
            place = self._after.get(tuple(self.ids[-length:])) if len(self.ids) >= length else None
            if place is not None:
                return self.ids[place : place + most]
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Guess more next time where all were right, less where they were not."""
        if guessed:
            more = 2 * right + 1
            self._ahead = min(self._most, more if right < guessed else max(MOST_TOKENS - 1, more))
