"""Tokens to text as they come, with no piece that ends inside a character."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

HALF = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character are decoded to


class Decoder(Protocol):
    """What decodes tokens; `Tokenizer`."""

    def decode(self, ids: list[int]) -> str:
        """Text of tokens, without the special ones."""
        ...


class TextStream:
    """Turns tokens into text as they come, holding a character back until its last byte is there.

    `tokenizers.decoders.DecodeStream` does the same but for its end: it has no way to give what it still holds.

    Args:
        shown: special tokens that are text all the same, with that text.
    """

    def __init__(self, tokenizer: Decoder, shown: Mapping[int, str] | None = None) -> None:
        self._tokenizer, self._as_text = tokenizer, shown or {}
        self._ids: list[int] = []
        self._context = 0  # first token decoded again, so that spaces between tokens come out right
        self._shown = 0  # first token not yet shown

    def push(self, token: int) -> str:
        """Add a token; the text that is complete now, or ''."""
        if token in self._as_text:
            return self.flush() + self._as_text[token]
        self._ids.append(token)
        fresh = self._fresh()
        if not fresh or fresh.endswith(HALF):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return fresh

    def flush(self) -> str:
        """What was held back, without half characters."""
        fresh = self._fresh().rstrip(HALF)
        if self._shown < len(self._ids):
            self._context, self._shown = self._shown, len(self._ids)
        return fresh

    def _fresh(self) -> str:
        shown = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(shown) :]
