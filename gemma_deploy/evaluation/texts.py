"""Text becomes windows to score: side by side, none over the other, BOS in front of each.

Windowing is part of a perplexity: the first tokens of a window have little to go on, so shorter windows give a larger
figure. That is why it is stated with every result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gemma_deploy import reading
from gemma_deploy.errors import UsageError
from gemma_deploy.evaluation.models import Tokens

BUNDLED_TEXTS = 400
LONGEST_TOKEN = 16  # characters, on the average over real text; no tokenizer of this family makes fewer tokens of it


@dataclass(frozen=True)
class ScoredWindows:
    """What is scored.

    Args:
        ids: windows, BOS first; all but BOS are scored.
        seqlen: tokens of each, BOS included; a text shorter than that is one shorter window.
        tokens: of the whole text that was read, BOS not counted.
        asked: how many windows were asked for.
    """

    ids: tuple[Tokens, ...]
    seqlen: int
    tokens: int
    asked: int

    @property
    def scored(self) -> int:
        """Tokens with a prediction before them."""
        return sum(len(window) - 1 for window in self.ids)

    def __str__(self) -> str:
        lengths = {len(window) for window in self.ids}
        size = f"{max(lengths)} tokens" if len(lengths) == 1 else "tokens"
        said = f"{len(self.ids)} window{'s' if len(self.ids) > 1 else ''} of {size}, BOS in front of each, side by side"
        return f"{said}, {self.scored} tokens scored"


def read_text(file: Path | None) -> tuple[str, str]:
    """A UTF-8 file, or the bundled C4 sample; and how results name it.

    Raises:
        UsageError: it cannot be read or is empty.
    """
    from gemma_deploy.calibration.sources import SOURCES

    if file is None:
        source = SOURCES["c4"]
        texts = source.texts(source.sample)
        return "\n\n".join(islice(texts, BUNDLED_TEXTS)), f"bundled {source.bundled}"
    text = reading.read_text(file, reading.text_kind("--text"))
    if not text.strip():
        raise UsageError(
            "the text is empty",
            where=str(file),
            expected="a UTF-8 text of a few thousand words",
            next_step="check --text",
        )
    return text, str(file)


def sha256_of_text(text: str) -> str:
    """What identifies a text in results."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_windows(
    text: str, encode: Callable[[str], Sequence[int]], bos: int, *, count: int, seqlen: int, name: str = "the text"
) -> ScoredWindows:
    """Cut a text.

    Args:
        encode: text -> ids without BOS.
        count: windows wanted; as many as there are when the text is shorter.
        seqlen: tokens of each, BOS included, at least 2.

    Raises:
        UsageError: the text has no tokens.
    """
    step = seqlen - 1
    ids = list(encode(text[: LONGEST_TOKEN * count * step + 4096]))
    if not ids:
        raise UsageError("no tokens are in it", where=name, expected="a text", next_step="check --text")
    found = [(bos, *ids[at : at + step]) for at in range(0, min(count * step, len(ids)), step)]
    whole = [window for window in found if len(window) == seqlen]
    return ScoredWindows(tuple(whole or found), seqlen, len(ids), count)
