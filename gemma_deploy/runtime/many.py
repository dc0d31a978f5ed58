"""A model that computes tokens of many sequences in one step: what the server needs of a back end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemma_deploy.errors import DeployError

PAGE = 128  # positions of a sequence that share memory with others, or do not
Packed = tuple[str, np.ndarray]  # an adapter as a model takes it: what the matrices are, and all of them, uint8


class NoRoomError(DeployError):
    """No memory is left for the keys and values of some sequences; nothing was done."""


@dataclass(frozen=True)
class Ranked:
    """What was asked of the logits of some tokens, without these.

    Args:
        ids: [rows, top] int32, tokens with the largest logits, the largest first; logits: [rows, top] float32, theirs.
        log_sums: [rows] float32: a token's logarithm of probability is its logit less this.
        asked: [rows] float32, logits of the tokens that were asked for; None where none was.
    """

    ids: np.ndarray
    logits: np.ndarray
    log_sums: np.ndarray
    asked: np.ndarray | None

    def rows(self, rows: Sequence[int]) -> Ranked:
        """Those of some of the tokens."""
        asked = None if self.asked is None else self.asked[rows]
        return Ranked(self.ids[rows], self.logits[rows], self.log_sums[rows], asked)


class ManySequences(Protocol):
    """A model, and sequences of it by their numbers.

    What a token gives has the same bits whatever tokens are computed beside it, and however its text was cut.

    Attributes:
        context: positions there are; vocabulary: logits of a token.
    """

    context: int
    vocabulary: int

    def load_adapter(self, text: str, panels: np.ndarray) -> int:
        """Have an adapter (`Packed`) at hand that sequences may be computed with: its number, which no other gets."""

    def drop_adapter(self, adapter: int) -> None:
        """Forget an adapter; its memory is free when no sequence is left that was begun with it."""

    def sequence(self, like: int = 0, *, adapter: int = 0) -> int:
        """A new sequence, empty or with the text of another, whose memory it shares: its number.

        Args:
            adapter: that an empty one is computed with, 0: with none. One like another goes on with that one's.
        """

    def drop(self, sequence: int) -> None:
        """Forget a sequence."""

    def rewind(self, sequence: int, length: int) -> None:
        """Forget what comes after `length` tokens of a sequence: any page of `PAGE` that ends at or behind its end."""

    def normed(self, pieces: Sequence[tuple[int, Sequence[int] | np.ndarray, int]]) -> np.ndarray:
        """Compute tokens of several sequences together.

        Args:
            pieces: number of a sequence, the tokens that follow it, and how many of the last of them are wanted.

        Returns:
            [wanted, hidden] float32: what leaves the final norm.

        Raises:
            NoRoomError: and nothing was done.
        """

    def ranked(
        self,
        pieces: Sequence[tuple[int, Sequence[int] | np.ndarray, int]],
        *,
        top: int = 0,
        asked: Sequence[int] | np.ndarray | None = None,
    ) -> Ranked:
        """As `normed`, `head` and `rank` one behind the other, with the same bits."""

    def room(self, rows: int) -> np.ndarray:
        """Memory for the logits of so many tokens."""

    def head(self, normed: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
        """Logits of what left the final norm: [n, hidden] -> [n, V] float32, the first rows of `into`."""

    def rank(self, logits: np.ndarray, *, top: int = 0, asked: Sequence[int] | np.ndarray | None = None) -> Ranked:
        """Of logits that `head` gave, the largest few and those that are asked for, a token for each row."""

    def held(self) -> int:
        """Sequences that there are."""

    def cache_used(self) -> int:
        """Bytes of the keys and values of all sequences."""

    def close(self) -> None:
        """Give memory back; sequences are gone."""
