"""An artifact that is divided by layers, each stage of it in a process of its own: what passes between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Stage(Protocol):
    """One stage, and its keys and values of the texts at hand.

    Attributes:
        takes: keys and values of earlier stages' layers that its own read, by name.
        position: slots of its cache that are filled; 0: it has read no prompt.
    """

    takes: Collection[str]
    position: int

    def prefill(self, given: Arrays, passing: Collection[str]) -> dict[str, np.ndarray]:
        """Read prompts, and forget those before.

        Args:
            given: `input_ids`, `attention_mask` and `position_ids` [B, P] int64, and what the stage before gave.
            passing: keys and values that later stages take.

        Returns:
            What the next stage takes; of the last one `logits` [B, 1, V].
        """

    def step(self, given: Arrays, passing: Collection[str]) -> dict[str, np.ndarray]:
        """Go on by a token for each text: `input_ids` and `position_ids` [B, 1]; see `prefill`."""


class Chain(Protocol):
    """All stages behind one another."""

    def prefill(self, given: Arrays) -> np.ndarray:
        """Read prompts, from their beginning: [B, 1, V] float32; see `Stage`.

        Raises:
            DeployError: a stage cannot compute them.
        """

    def step(self, given: Arrays) -> np.ndarray:
        """Go on by a token for each text: [B, 1, V] float32.

        Raises:
            DeployError: a stage is gone, or has another text: it would have to be read again.
        """
