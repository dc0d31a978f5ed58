"""A model for OpenVINO as a source of logits: exact, or as it is shipped."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

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
        self._file, self._hidden_size, self._threads = file, hidden_size, threads
        self._options = opened.STRICT if kernels == STRICT else {}

    def _compiled(self, part: int) -> Any:
        """The body (0) or the head (1), each with a copy of its weights as they are multiplied."""
        model = opened.cut_at_head(opened.open_model(self._file), self._hidden_size)[part]
        return opened.compiled(model, threads=self._threads, options=self._options)

    @functools.cached_property
    def _head(self) -> Any:
        return self._compiled(1).create_infer_request()

    def run(self, cases: Sequence[Case]) -> Features:
        """What leaves the final norm, [prompt + steps, H] of every row."""
        body = self._compiled(0)  # gone when it has run
        rows, total = 0, sum(len(case.prompts) for case in cases)
        found: Features = []
        for case in cases:
            found.append([])
            for prompt, forced in zip(case.prompts, case.forced, strict=True):
                state = opened.State(body)
                steps = [[int(token) for token in prompt], *([int(token)] for token in forced)]
                found[-1].append(np.concatenate([np.array(state.step(step)) for step in steps]))
                rows += 1
                if self.progress is not None:
                    self.progress(rows, total)
        return found

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, H] -> [n, V]."""
        (logits,) = self._head.infer([features[None]], share_outputs=True).values()
        rows: np.ndarray = logits[0]
        return rows
