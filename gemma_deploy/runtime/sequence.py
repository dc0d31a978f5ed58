"""One sequence of tokens that a model goes on with, whatever computes it: `Session`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.generate import GenerationStats, check_length, stream_tokens
from gemma_deploy.text import StopStrings, TextStream, Tokenizer


class Session(ABC):
    """One sequence of tokens that a model goes on with; its cache is its own.

    Replies of one session follow each other: a new one ends the one before it. Sessions of one engine do not know of
    each other, and may be driven from threads of their own.

    Args:
        tokenizer: of the artifact; path: of the artifact, for messages.
        stop_ids: tokens that end a reply, and are not of it.
    """

    def __init__(self, tokenizer: Tokenizer, path: Path, stop_ids: Collection[int]) -> None:
        self.tokenizer, self.path, self.stop_ids = tokenizer, path, frozenset(stop_ids)
        self._ending = threading.Event()  # of the reply that is being made
        self._adapter: str | None = None

    @property
    @abstractmethod
    def ids(self) -> list[int]:
        """The sequence so far: what was read and what was said, stop tokens not among it."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Add tokens to the sequence; what the model makes of them.

        Args:
            ids: a prompt, or one token or more behind what there is.

        Returns:
            [V] float32: logits of the token that comes next.

        Raises:
            UsageError: there is no room for them; the sequence is as it was.
        """

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that the model is computed with; None: with none."""
        return self._adapter

    def use(self, adapter: str | None) -> None:
        """Go on with another adapter, or with none: what the sequence holds is read again when it goes on.

        Args:
            adapter: what `Engine.load_adapter` gave.

        Raises:
            UsageError: no adapter of that name is loaded.
        """
        if adapter != self._adapter:
            self._change_adapter(adapter)

    def _change_adapter(self, adapter: str | None) -> None:
        """See `use`: of a session that can go on with adapters, to another one than it has."""
        raise UsageError(f"no adapter {adapter!r} is loaded", where=str(self.path))

    def reply(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        shown: Mapping[int, str] | None = None,
        stats: GenerationStats | None = None,
    ) -> Iterator[str]:
        """Add tokens to the sequence, and yield what the model says to them.

        Joined, the pieces are the text of all tokens before the stop; no piece ends inside a character.

        Args:
            ids: token ids; the first of a sequence is BOS (`Tokenizer.encode` and `Conversation` see to it).
            max_new_tokens: at most so many.
            stop: texts that end the reply and are not of it. Their tokens stay in the sequence.
            shown: special tokens that are part of the text, with their text; the others are left out.
            stats: filled in while it runs.

        Raises:
            UsageError: there is no room for them and an answer, or they are no tokens of this model. Raised at once,
                before the first piece; the sequence is as it was.
            DeployError: while it runs: the model gave NaN or infinite logits.
        """
        check_length(max_new_tokens)
        strings = StopStrings(stop)
        stats = stats if stats is not None else GenerationStats()
        stats.prompt_tokens = self._admitted(ids)
        self._ending.set()
        ending = self._ending = threading.Event()
        return stream_tokens(
            self._steps(list(ids), stats),
            TextStream(self.tokenizer, shown),
            stats,
            max_new_tokens=max_new_tokens,
            stops=self.stop_ids,
            full=self._full,
            strings=strings,
            cancelled=ending.is_set,
        )

    def cancel(self) -> None:
        """End the reply that is being made after the token at hand; from any thread. Nothing where there is none."""
        self._ending.set()

    def _admitted(self, ids: Sequence[int]) -> int:
        """How many tokens will be read so that the sequence has these too.

        Raises:
            UsageError: see `reply`.
        """
        if not len(ids):
            raise UsageError(
                "the prompt is empty: it needs at least the BOS token",
                where=str(self.path),
                next_step="put BOS in front of the prompt, as the artifact's tokenizer does",
            )
        return self._admit(list(ids))

    @abstractmethod
    def _admit(self, ids: list[int]) -> int:
        """See `_admitted`."""

    @abstractmethod
    def _steps(self, ids: list[int], stats: GenerationStats) -> Iterator[Sequence[int]]:
        """Add tokens to the sequence, and yield those of one step after another; `stats.tokens` has those said."""

    @abstractmethod
    def _full(self) -> int | None:
        """How many slots the context has, None while there is room."""
