"""The static pair as a user runs it, as a source for parity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features


class FastSource:
    """The artifact as a user runs it: whole graphs, optimized by ONNX Runtime; logits of prompt end and decode steps.

    Args:
        path: the artifact's directory.
        threads: ORT threads, 0 for its default.
    """

    name = "fast"

    def __init__(self, path: Path, threads: int = 0) -> None:
        self.path, self.threads = Path(path), threads

    def run(self, cases: Sequence[Case]) -> Features:
        """Logits [steps + 1, V] of every row."""
        runner = StaticRunner(self.path, mode="fast", threads=self.threads)
        found: Features = []
        for case in cases:
            logits = [runner.prefill([list(prompt) for prompt in case.prompts])]
            logits += [runner.step([row[step] for row in case.forced]) for step in range(case.steps)]
            found.append([np.stack([step[row] for step in logits]) for row in range(len(case.prompts))])
        return found

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """The features are logits already."""
        return features
