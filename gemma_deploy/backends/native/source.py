"""An artifact of `backend.type: native` as a source of logits: exact on dequantized weights, or as it is shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gemma_deploy.backends.native.adapters import FORMS, packed
from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model
from gemma_deploy.names import PARAMS
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features
from gemma_deploy.progress import Tick

Kernels = Literal["strict", "shipped"]
STRICT: Kernels = "strict"
SHIPPED: Kernels = "shipped"


class NativeSource:
    """The artifact in the library, a row at a time.

    Args:
        path: the artifact's directory.
        kernels: `strict`: float32 products and caches, nothing rounded; `shipped`: what a user runs.
        adapter: its matrices, where it is computed with one; form: to which shipped kernels round these.
    """

    def __init__(
        self,
        path: Path,
        kernels: Kernels = STRICT,
        *,
        threads: int = 0,
        adapter: Mapping[str, np.ndarray] | None = None,
        form: str = FORMS[0],
    ) -> None:
        self.name: str = kernels
        self.progress: Tick | None = None
        self.unit = "sequences"
        folder, strict = Path(path).resolve(), kernels == STRICT
        plan = plan_in(folder)
        self._model = Model(
            plan,
            folder / PARAMS,
            threads=threads,
            cache="float32" if strict else "",
            exact=strict,
        )
        form = FORMS[0] if strict else form
        self._adapter = 0 if adapter is None else self._model.load_adapter(*packed(adapter, plan, form))

    def run(self, cases: Sequence[Case]) -> Features:
        """What leaves the final norm, [prompt + steps, H] of every row."""
        rows, total = 0, sum(len(case.prompts) for case in cases)
        found: Features = []
        for case in cases:
            found.append([])
            for prompt, forced in zip(case.prompts, case.forced, strict=True):
                sequence = self._model.sequence(adapter=self._adapter)
                made = [self._model.normed([(sequence, prompt, len(prompt))])]
                made += [self._model.normed([(sequence, [token], 1)]) for token in forced]
                self._model.drop(sequence)
                found[-1].append(np.concatenate(made))
                rows += 1
                if self.progress is not None:
                    self.progress(rows, total)
        return found

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, H] -> [n, V]."""
        return self._model.head(features)
