"""Artifacts of `backend.type: native` in our library, without ONNX Runtime. See protocol.py."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from protocol import Generated, Sizes, main

from gemma_deploy.backends.native.engine import NativeModel


class Native:
    """A model; every text gets a sequence of its own."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self.model, self.room = NativeModel(path, (), sizes.threads), sizes.room

    def generate(self, prompt: list[int], steps: int) -> Generated:
        """Greedy."""
        sequence = self.model.sequence(self.room)
        started = time.perf_counter()
        tokens = [int(sequence.read(prompt).argmax())]
        first = time.perf_counter()
        for _ in range(steps):
            tokens.append(int(sequence.read(tokens[-1:]).argmax()))
        return Generated(first - started, tokens, time.perf_counter() - first)

    def together(self, prompts: list[list[int]], steps: int) -> float:
        """Greedy, all texts in each step: seconds of the steps."""
        library = self.model.library
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
        return self.model.sequence(self.room).feed(window)


if __name__ == "__main__":
    main(Native)
