"""Names the first module that leaves tolerance: what a divergence is, and two torch models compared module by module.

How an artifact is searched is its back end's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.reference import TorchSource

EMBEDDED, NORMED = "model.embed_tokens.out", "model.norm.out"
TOLERANCE = 1e-5  # of float32 arithmetic, relative to the largest value (real 270M: 2e-6)


@dataclass(frozen=True)
class Divergence:
    """Where two models part.

    Attributes:
        module: name of the first module whose output differs; phase: prefill or decode.
        error: largest difference there, relative to the largest reference value.
        tolerance: what a sound one stays under.
    """

    reference: str
    test: str
    module: str
    phase: str
    error: float
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """Plain dict with a sentence under `text`."""
        alone = "no layer alone leaves tolerance; largest error in"
        verb = "first differs in" if self.error > self.tolerance else alone
        text = (
            f"{self.test} {verb} {self.module} ({self.phase}): {self.error:.2g} of its largest value against "
            f"{self.reference}, tolerance {self.tolerance:g}"
        )
        return {**asdict(self), "text": text}


def torch_divergence(hf: TorchSource, patched: TorchSource, case: Case, *, tolerance: float) -> Divergence | None:
    """Compare what every module makes, in the order the reference runs them."""
    layers = hf.checkpoint.config.layers
    names = {f"{layer.prefix}{name}" for layer in layers for name in (*layer.points(), "out")} | {EMBEDDED, NORMED}
    expected: dict[str, np.ndarray] = {}
    hf.modules(case, 0, names.__contains__, keep=expected.__setitem__)
    got: dict[str, np.ndarray] = {}
    patched.modules(case, 0, expected.__contains__, keep=got.__setitem__)
    prompt, names_made = len(case.prompts[0]), [name for name in expected if name in got]
    errors = ((name, *errors_by_phase(expected[name], got[name], prompt, tolerance=tolerance)) for name in names_made)
    return first_or_worst(hf.name, patched.name, errors, tolerance=tolerance)


def errors_by_phase(expected: np.ndarray, got: np.ndarray, prompt: int, *, tolerance: float) -> tuple[str, float]:
    """A phase and its error: prefill when it is wrong already, else the phase with the larger error."""
    count = min(len(expected), len(got))  # the prefill graph may keep the last positions only
    steps = len(expected) - prompt
    reference, test = expected[-count:], got[-count:]
    parts = {"prefill": slice(0, count - steps), "decode": slice(count - steps, count)}
    errors = {
        phase: relative_error(reference[part], test[part]) for phase, part in parts.items() if len(reference[part])
    }
    wrong = [name for name, error in errors.items() if not error <= tolerance]
    phase = wrong[0] if wrong else max(errors, key=lambda name: errors[name])
    return phase, errors[phase]


def relative_error(reference: np.ndarray, test: np.ndarray) -> float:
    """Largest difference relative to the largest reference value; inf when anything is not finite."""
    largest = float(np.abs(reference - test).max()) / max(1.0, float(np.abs(reference).max()))
    return largest if np.isfinite(largest) else float("inf")


def first_or_worst(
    reference: str, test: str, errors: Iterator[tuple[str, str, float]], *, tolerance: float
) -> Divergence | None:
    """Stop at the first error above tolerance; without one, the largest."""
    worst: Divergence | None = None
    for name, phase, error in errors:
        here = Divergence(reference, test, name.removesuffix(".out"), phase, error, tolerance)
        if not error <= tolerance:
            return here
        if worst is None or error > worst.error:
            worst = here
    return worst
