"""A model for OpenVINO as a source of logits: exact, or as it is shipped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gemma_deploy.backends.openvino import model as opened
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features
from gemma_deploy.progress import Tick

Kernels = Literal["strict", "shipped"]
STRICT: Kernels = "strict"
SHIPPED: Kernels = "shipped"


class OpenVinoSource:
    """The artifact in OpenVINO, a row at a time.

    Args:
        file: of the model; hidden_size: of it.
        kernels: `strict`: float32, nothing rounded; `shipped`: what a user runs who says nothing.
    """

    def __init__(self, file: Path, kernels: Kernels = STRICT, *, hidden_size: int, threads: int = 0) -> None:
        self.name: str = kernels
        self.progress: Tick | None = None
        self.unit = "sequences"
        options = opened.STRICT if kernels == STRICT else {}
        body, head = opened.cut_at_head(opened.open_model(file), hidden_size)
        self._body = opened.compiled(body, threads=threads, options=options)
        self._head = opened.compiled(head, threads=threads, options=options).create_infer_request()

    def run(self, cases: Sequence[Case]) -> Features:
        """What leaves the final norm, [prompt + steps, H] of every row."""
        rows, total = 0, sum(len(case.prompts) for case in cases)
        found: Features = []
        for case in cases:
            found.append([])
            for prompt, forced in zip(case.prompts, case.forced, strict=True):
                state = opened.State(self._body)
                steps = [[int(token) for token in prompt], *([int(token)] for token in forced)]
                found[-1].append(np.concatenate([np.array(state.step(step)) for step in steps]))
                rows += 1
                if self.progress is not None:
                    self.progress(rows, total)
        return found

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, H] -> [n, V]."""
        (logits,) = self._head.infer([features[None]]).values()
        rows: np.ndarray = logits[0]
        return rows
