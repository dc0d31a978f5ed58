"""Answers that follow a grammar, by llguidance: JSON of a schema, a regular expression, choices, a grammar of Lark."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemma_deploy.errors import UsageError
from gemma_deploy.reading import open_regular
from gemma_deploy.text.files import TOKENIZER

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LARGEST = 256 << 10  # characters of a grammar
MOST_STEP_SECONDS = 0.25  # of a processor for a token, which all others wait for as well
READ_TOGETHER = 2  # grammars, so that cores are left for what is being computed
MOST_CHOICES = 1000
# Spaces that a model may write anywhere are what small ones write without end.
JSON_OPTIONS: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
Kind = Literal["json", "regex", "choice", "grammar"]
WRONG = "send a simpler one, or mend it"


@dataclass(frozen=True)
class Grammar:
    """What an answer has to follow.

    Args:
        kind: what `given` is: a JSON schema as an object or text (`json`), a regular expression of Rust's regex crate
            (`regex`), texts one of which it is (`choice`), a grammar of Lark or GBNF (`grammar`).
    """

    kind: Kind
    given: Any


class Guides:
    """Makes guides for one tokenizer, which llguidance reads when the first is asked for.

    Args:
        folder: with tokenizer.json; vocabulary: logits of a token; stops: tokens that end a text.

    Attributes:
        readers: threads for `guide`.
    """

    def __init__(self, folder: Path, vocabulary: int, stops: Collection[int]) -> None:
        self._path, self._vocabulary, self._stops = folder / TOKENIZER, vocabulary, sorted(stops)
        self._file = open_regular(self._path)  # another artifact may have its name when it is read
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self.readers = ThreadPoolExecutor(READ_TOGETHER, "gemma-deploy-grammar")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def guide(self, grammar: Grammar) -> Guide:
        """One that begins; takes up to a second, of another thread.

        Raises:
            UsageError: the grammar is damaged, too large, or too costly.
        """
        with self._lock:
            self._read()  # says what is wrong with the tokenizer before what is wrong with the grammar
        return self.of_words(_compiled(grammar))

    def of_words(self, words: str) -> Guide:
        """The same of a grammar as llguidance reads it: `Guide.words` of another."""
        from llguidance import LLMatcher

        if len(words) > LARGEST:
            raise UsageError(f"the grammar has {len(words)} characters", expected=f"{LARGEST}", next_step=WRONG)
        with self._lock:
            tokenizer = self._read()
        made = Guide(LLMatcher(tokenizer, words, log_level=0), self._vocabulary, words)
        made.copy().allowed()  # what explodes does so at the first token
        return made

    def _read(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            try:
                self._tokenizer = LLTokenizer(
                    f"/proc/self/fd/{self._file.fileno()}", n_vocab=self._vocabulary, eos_token=self._stops
                )
            except ValueError as error:
                raise UsageError(
                    f"llguidance does not read this tokenizer: {str(error)[:200]}",
                    where=str(self._path),
                    next_step="ask for text without a grammar",
                ) from None
        return self._tokenizer


class Guide:
    """What one answer may say next.

    Attributes:
        words: the grammar, as llguidance reads it.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int, words: str) -> None:
        self._matcher, self._vocabulary, self.words = matcher, vocabulary, words
        self._check()

    def copy(self) -> Guide:
        """Another that stands where this one does."""
        return Guide(self._matcher.deep_copy(), self._vocabulary, self.words)

    def allowed(self) -> np.ndarray:
        """Which tokens may come next: [V] bool.

        Raises:
            UsageError: the grammar is too costly.
        """
        started = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check(started)
        return np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)

    def said(self, token: int) -> None:
        """Go on behind a token that was allowed.

        Raises:
            UsageError: it was not, or the grammar is too costly.
        """
        started = time.thread_time()
        self._matcher.consume_token(token)
        self._check(started)

    def _check(self, started: float | None = None) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:300]
            raise UsageError(f"the grammar cannot be followed: {reason}", next_step=WRONG)
        if started is not None and time.thread_time() - started > MOST_STEP_SECONDS:
            raise UsageError(
                f"the grammar is too costly: a token took more than {MOST_STEP_SECONDS:g} s", next_step=WRONG
            )


def _compiled(grammar: Grammar) -> str:
    """As llguidance reads it.

    Raises:
        UsageError: it is none of its kind.
    """
    from llguidance import LLMatcher, grammar_from

    given = grammar.given
    try:
        if grammar.kind == "json":
            schema = given if isinstance(given, str) else json.dumps(given)
            return str(LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS))
        if grammar.kind == "regex":
            return str(LLMatcher.grammar_from_regex(given))
        if grammar.kind == "choice":
            if not given or len(given) > MOST_CHOICES:
                raise UsageError(f"{len(given)} choices", expected=f"1 to {MOST_CHOICES}", next_step=WRONG)
            return str(grammar_from("choice", json.dumps(given)))
        return str(grammar_from("grammar", given))
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"the grammar is none: {str(error)[:300]}", next_step=WRONG) from None
