"""Texts that end a generation, cut out exactly though they come in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_deploy.errors import UsageError


class StopStrings:
    """Passes pieces of a text on until a stop string is complete, and holds back what may be the beginning of one.

    The text ends before the stop string whose last character comes first, and of several that end there before the
    longest: how the text is divided into pieces makes no difference.

    Args:
        strings: none for a text that no string ends.

    Attributes:
        found: the stop string that ended the text; None so far.

    Raises:
        UsageError: one of them is empty.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        if isinstance(strings, str):
            strings = (strings,)
        if not all(strings):
            raise UsageError(
                "a stop string is empty", expected="text of one character or more", next_step="leave it out"
            )
        self._strings = tuple(sorted(set(strings), key=len, reverse=True))
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Add a piece of text; what of it and of the text before can be passed on, or ''. Nothing behind a stop."""
        if self.found is not None:
            return ""
        text = self._held + piece
        for end in range(len(self._held) + 1, len(text) + 1):  # a string that ended before would have been found
            for string in self._strings:
                if text.endswith(string, 0, end):
                    self.found, self._held = string, ""
                    return text[: end - len(string)]
        kept = self._beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, where the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """How many characters at the end of a text begin a stop string."""
        longest = min(len(text), max(map(len, self._strings), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(string.startswith(text[-count:]) for string in self._strings):
                return count
        return 0
