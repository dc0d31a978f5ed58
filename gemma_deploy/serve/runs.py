"""Texts that a scheduler computes, and what of them goes into a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_deploy.serve.choosing import Chooser
from gemma_deploy.serve.request import Request, Scores


class Run:
    """A request that waits, or has a place.

    Args:
        number: of the request; context: positions of a text, at most.

    Attributes:
        ids: [prompt + most] int32, its tokens, of which there are `length`, and `read` are in its sequence.
        scored: so many of the prompt's tokens have their scores; cached: were known before; began: `Began` was told.
        begun: when it had a place for the first time, in seconds of `time.perf_counter`; 0: not yet.
    """

    def __init__(self, number: int, request: Request, context: int) -> None:
        self.number, self.request, self.adapter = number, request, request.adapter
        self.prompt = len(request.ids)
        self.most = min(request.max_tokens, context - self.prompt)  # tokens to say
        self.ids = np.zeros(self.prompt + self.most, np.int32)
        self.ids[: self.prompt] = request.ids
        self.length, self.read = self.prompt, 0  # tokens that there are, and that the sequence has
        self.sequence = 0
        self.chooser = Chooser(request.choice, request.ids, request.stop_ids, guide=request.guide)
        self.scores = None if request.prompt_top is None else Scores.empty(self.prompt, request.prompt_top)
        self.scored = 1  # the prompt's tokens before this one have their scores
        self.cached, self.began, self.begun = 0, False, 0.0

    @property
    def speaks(self) -> bool:
        """Whether one token is to be read, the newest that was said."""
        return self.length > self.prompt and self.read == self.length - 1

    def wanted(self, count: int) -> int:
        """Of the last of how many of the next tokens what comes out is needed."""
        end = self.read + count
        first = end - 1 if end == self.length and self.length < len(self.ids) else end
        if self.scores is not None and self.scored < self.prompt:
            first = min(first, max(self.read, self.scored - 1))
        return end - first


@dataclass(frozen=True)
class Piece:
    """Tokens of a text in a step: `count` of those that follow, what comes out of the last `wanted`."""

    run: Run
    count: int
    wanted: int

    @property
    def takes_likeliest(self) -> bool:
        """Whether nothing but the likeliest tokens are needed, if anything is."""
        run = self.run
        return self.wanted == 0 or (run.chooser.greedy and (run.scores is None or run.scored >= run.prompt))

    @property
    def given(self) -> tuple[int, np.ndarray, int]:
        """As the model takes it."""
        run = self.run
        return run.sequence, run.ids[run.read : run.read + self.count], self.wanted
