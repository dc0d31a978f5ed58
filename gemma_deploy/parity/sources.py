"""What parity compares: anything that turns cases into final hidden states, and hidden states into logits.

Hidden states are small and kept; logits are made in blocks when two sources are compared, so a vocabulary of 262,144
costs a few megabytes. Sources: `reference.TorchSource`, `segments.StrictSource`, `FastSource` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from gemma_deploy.parity.cases import Case

# case -> row -> [positions, features]; the last positions of the row's sequence, prompt and forced tokens
Features = list[list[np.ndarray]]


class Source(Protocol):
    """A model, or a graph, or a fake of one."""

    name: str

    def run(self, cases: Sequence[Case]) -> Features:
        """What `head` needs, for the last positions of every row: all of them, or those the source computes."""

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, ...] -> logits [n, V] float32.

        Args:
            prompt_end: they are of a prompt's last position; an artifact has another graph for those.
        """


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
        from gemma_deploy.runtime import StaticRunner

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
