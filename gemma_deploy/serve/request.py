"""What is asked of a model, and what comes back: token ids in, events out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.runtime.limits import check_tokens
from gemma_deploy.runtime.many import Packed
from gemma_deploy.serve.choosing import Choice
from gemma_deploy.serve.guiding import Guide

MOST_TOP = 1024  # alternatives of a token whose log-probabilities can be asked for


@dataclass(frozen=True)
class Request:
    """One text to go on with.

    Args:
        ids: the prompt, one token at least.
        choice: how tokens are chosen.
        max_tokens: at most so many; 0 only reads the prompt. Fewer where the context ends before.
        stop_ids: tokens that end the text, and are not of it.
        top: so many likeliest tokens come beside each token that is said, with log-probabilities of all; None: none do.
        prompt_top: the same of the prompt's own tokens, the first of which nothing predicts.
        guide: says which tokens may come next; this request's own.
        adapter: number of the adapter it is computed with (`Scheduling.load`), 0: with none.
    """

    ids: Sequence[int]
    choice: Choice = field(default_factory=Choice)
    max_tokens: int = 16
    stop_ids: frozenset[int] = frozenset()
    top: int | None = None
    prompt_top: int | None = None
    guide: Guide | None = None
    adapter: int = 0


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of tokens, as the model gives them: before temperature, penalties and all else.

    Args:
        own: [n] float32, of the tokens themselves; NaN of a prompt's first.
        ids: [n, top] int32, the likeliest in the place of each, the likeliest first; top: [n, top] float32, theirs.
    """

    own: np.ndarray
    ids: np.ndarray
    top: np.ndarray

    @classmethod
    def empty(cls, tokens: int, top: int) -> Scores:
        """Of so many tokens, none known yet."""
        own, likeliest = np.full(tokens, np.nan, np.float32), np.full((tokens, top), np.nan, np.float32)
        return cls(own, np.zeros((tokens, top), np.int32), likeliest)

    def part(self, begin: int, end: int) -> Scores:
        """Those of some of the tokens; the same memory."""
        return Scores(self.own[begin:end], self.ids[begin:end], self.top[begin:end])

    def put(self, at: int, other: Scores) -> None:
        """Take those of another over, as many alternatives as there is room for, from a token on."""
        end, top = at + len(other.own), self.top.shape[1]
        self.own[at:end], self.ids[at:end], self.top[at:end] = other.own, other.ids[:, :top], other.top[:, :top]

    def copy(self) -> Scores:
        """The same in memory of its own."""
        return Scores(self.own.copy(), self.ids.copy(), self.top.copy())


@dataclass(frozen=True)
class Began:
    """The prompt has been read.

    Args:
        cached: so many of its tokens were known from earlier texts; scores: of its tokens, where they were asked for.
        begun: when it began to be computed, in seconds of `time.perf_counter`.
    """

    cached: int
    scores: Scores | None = None
    begun: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Said:
    """A token of the text.

    Args:
        scores: of this token alone, where they were asked for.
    """

    token: int
    scores: Scores | None = None


@dataclass(frozen=True)
class Ended:
    """The last event of a request that was answered.

    Args:
        reason: "stop": one of its stop tokens, which is `token`; "length": `max_tokens`, or the context is full;
            "cancelled": somebody asked for that.
        scores: of the stop token, where they were asked for.
    """

    reason: Literal["stop", "length", "cancelled"]
    token: int | None = None
    scores: Scores | None = None


@dataclass(frozen=True)
class Failed:
    """The last event of a request that cannot be answered; others are not touched by it."""

    error: DeployError


Event = Began | Said | Ended | Failed
Events = list[tuple[int, Event]]  # with the number that `add` gave
Prepared = str | Packed  # an adapter: by its name in an engine, or all that there is of it


class QueueFullError(UsageError):
    """No more requests are taken now."""


class LostError(DeployError):
    """What computed a request is gone, or nothing is there to compute one; it may be sent again."""


@dataclass(frozen=True)
class Counts:
    """What a scheduler is at, and what it has done since it was made.

    Args:
        running: requests being computed; waiting: requests that are not yet.
        prompt_tokens, tokens: of prompts read and of texts said; cached_tokens: of prompts, known from earlier ones.
        steps: of the model; preempted: requests set back because memory was out.
        cache_bytes: of keys and values that are held; kept: texts' beginnings among them that later texts may take
            over; held: sequences that there are, one for each of these and for each text that is computed.
        adapters: that are loaded.
    """

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0
    preempted: int = 0
    cache_bytes: int = 0
    kept: int = 0
    adapters: int = 0
    held: int = 0


class Scheduling(Protocol):
    """Who decides what is computed next. One thread makes all calls but `prepare`.

    Attributes:
        context: positions of a text, its prompt included; vocabulary: tokens there are.
        together: texts that a step computes; 1: one after the other.
    """

    context: int
    vocabulary: int
    together: int

    def add(self, request: Request) -> int:
        """Take a request: its number.

        Raises:
            UsageError: it cannot be answered (`check_request`, or its adapter is gone). QueueFullError: not now.
        """

    def prepare(self, adapter: str | Path) -> Prepared:
        """Read an adapter, and convert it; from any thread.

        Args:
            adapter: as `Engine.load_adapter` takes it.

        Raises:
            UsageError, ArtifactError, CheckpointError, NotBuiltError: as `Engine.load_adapter`.
        """

    def load(self, prepared: Prepared) -> int:
        """Have an adapter at hand that `prepare` gave: a number for `Request.adapter` that no other gets.

        Raises:
            UsageError: there are too many.
        """

    def unload(self, adapter: int) -> None:
        """Take no further request with an adapter; it goes when those that there are have ended.

        Raises:
            NoAdapterError: it is not loaded.
        """

    def cancel(self, number: int) -> None:
        """End a request with the next step, which gives back its memory. Nothing where it has ended."""

    def step(self) -> Events:
        """Compute one step; what came of it. Nothing where there is nothing to do."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""

    def counts(self) -> Counts:
        """See `Counts`."""

    def close(self) -> None:
        """Give memory back; whatever is not answered never will be."""


def check_request(request: Request, context: int, vocabulary: int) -> None:
    """Refuse what no model of this size answers.

    Raises:
        UsageError: the prompt is empty, too long, or holds tokens that there are not, or what is asked for is out of
            bounds.
    """
    if not len(request.ids):
        raise UsageError("the prompt has no tokens", next_step="begin it with the BOS token")
    check_tokens(request.ids, vocabulary, "prompt")
    room = context - (request.max_tokens > 0)
    if len(request.ids) > room:
        raise UsageError(
            f"the prompt has {len(request.ids)} tokens, and the context is {context} tokens, the answer included",
            next_step="send a shorter one",
        )
    most = min(MOST_TOP, vocabulary)
    for top in (request.top, request.prompt_top):
        if top is not None and not 0 <= top <= most:
            raise UsageError(
                f"log-probabilities of {top} tokens are asked for", expected=f"0 to {most}", next_step="ask for fewer"
            )
    if request.max_tokens < 0:
        raise UsageError(f"max_tokens is {request.max_tokens}", expected="0 or more", next_step="give a larger one")
    request.choice.check(vocabulary)
