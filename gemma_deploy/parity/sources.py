"""What parity compares: anything that turns cases into final hidden states, and hidden states into logits.

Hidden states are small and kept; logits are made in blocks when two sources are compared, so a vocabulary of 262,144
costs a few megabytes. Sources: `reference.TorchSource`, and those of the back ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from gemma_deploy.parity.cases import Case
from gemma_deploy.progress import Tick

# case -> row -> [positions, features]; the last positions of the row's sequence, prompt and forced tokens
Features = list[list[np.ndarray]]


@runtime_checkable
class Counting(Protocol):
    """A source that tells how far it is.

    Attributes:
        progress: called with (layers passed, all of them), or what else `unit` names; None: nobody asks.
    """

    progress: Tick | None
    unit: str


class LogitSource(Protocol):
    """A model, or a graph, or a fake of one."""

    name: str

    def run(self, cases: Sequence[Case]) -> Features:
        """What `head` needs, for the last positions of every row: all of them, or those the source computes."""

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, ...] -> logits [n, V] float32.

        Args:
            prompt_end: they are of a prompt's last position; an artifact has another graph for those.
        """
