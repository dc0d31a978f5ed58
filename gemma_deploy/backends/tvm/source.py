"""A compiled pair as a source of logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_deploy.backends.tvm.runner import open_runner
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features
from gemma_deploy.progress import Tick

STRICT = "strict"  # there is but one: nothing is rounded


class CompiledSource:
    """What a user runs; logits of prompt ends and steps, or of every token.

    Args:
        path: the artifact's directory; threads: 0 for all cores.
        every: read prompts a token at a time: the prefill gives the last position's logits alone.
    """

    name = STRICT

    def __init__(self, path: Path, threads: int = 0, *, every: bool = False) -> None:
        self._runner = open_runner(path, threads)
        self._every = every
        self.progress: Tick | None = None
        self.unit = "sequences"

    def run(self, cases: Sequence[Case]) -> Features:
        """Logits [steps + 1, V] of every row, or [tokens, V]."""
        found: Features = []
        for number, case in enumerate(cases):
            prompts = [list(map(int, prompt)) for prompt in case.prompts]
            forced = [list(map(int, row)) for row in case.forced]
            if self._every:
                found.append([self._row(prompt, row) for prompt, row in zip(prompts, forced, strict=True)])
            else:
                logits = [self._runner.prefill(prompts)]
                logits += [self._runner.step([row[step] for row in forced]) for step in range(case.steps)]
                found.append([np.stack([step[row] for step in logits]) for row in range(len(prompts))])
            if self.progress is not None:
                self.progress(number + 1, len(cases))
        return found

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """The features are logits already."""
        return features

    def _row(self, prompt: list[int], forced: list[int]) -> np.ndarray:
        """[tokens, V]. A prefill takes all of its slots, however short it is; when the rest is full, another begins."""
        batch, tokens = self._runner.batch, [*prompt, *forced]
        logits: list[np.ndarray] = []
        while len(logits) < len(tokens):
            read = len(logits) + 1
            logits.append(self._runner.prefill([tokens[:read]] * batch)[0])
            for token in tokens[read : read + self._runner.remaining]:
                logits.append(self._runner.step([token] * batch)[0])
        return np.stack(logits)
