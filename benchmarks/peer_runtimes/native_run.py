"""Artifacts of `backend.type: native` in our library, without ONNX Runtime. See protocol.py."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from protocol import Generated, Sizes, main

from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model
from gemma_deploy.names import PARAMS


class Native:
    """A model; every text gets a sequence of its own."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self.library = Model(plan_in(path), path / PARAMS, threads=sizes.threads)
        self.room = self.library.room(1)

    def generate(self, prompt: list[int], steps: int) -> Generated:
        """Greedy."""
        sequence = self.library.sequence()
        started = time.perf_counter()
        tokens = [self.after(sequence, prompt)]
        first = time.perf_counter()
        for _ in range(steps):
            tokens.append(self.after(sequence, tokens[-1:]))
        seconds = time.perf_counter() - first
        self.library.drop(sequence)
        return Generated(first - started, tokens, seconds)

    def after(self, sequence: int, tokens: list[int]) -> int:
        """The likeliest token behind these."""
        return int(self.library.logits([(sequence, tokens, 1)], self.room).argmax())

    def together(self, prompts: list[list[int]], steps: int) -> float:
        """Greedy, all texts in each step: seconds of the steps."""
        library = self.library
        sequences = [library.sequence() for _ in prompts]
        library.logits([(one, prompt, 1) for one, prompt in zip(sequences, prompts, strict=True)])
        tokens = [prompt[-1] for prompt in prompts]
        started = time.perf_counter()
        for _ in range(steps):
            rows = library.logits([(one, [token], 1) for one, token in zip(sequences, tokens, strict=True)])
            tokens = [int(one) for one in rows.argmax(-1)]
        seconds = time.perf_counter() - started
        for one in sequences:
            library.drop(one)
        return seconds

    def logits(self, window: list[int]) -> np.ndarray:
        """Of one prefill."""
        sequence = self.library.sequence()
        found = self.library.logits([(sequence, window, len(window))])
        self.library.drop(sequence)
        return found


if __name__ == "__main__":
    main(Native)
