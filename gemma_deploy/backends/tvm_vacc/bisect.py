"""Names the first layer and operator of the static pair that leave tolerance.

Every layer of the artifact is given the *reference's* input, so what it shows is its own error and not what came down
from the layers before. Inside the first wrong layer its modules are compared in the order they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from gemma_deploy.backends.tvm_vacc.segments import CHOSEN, EMBEDDED, NORMED, CaseState, StrictSource, layer_input
from gemma_deploy.names import LAYERS
from gemma_deploy.parity.bisect import (
    TOLERANCE,
    Divergence,
    errors_by_phase,
    first_or_worst,
    relative_error,
    torch_divergence,
)
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.schemes import Scheme

# Largest local error of a sound layer, relative to its largest output. Measured on the real 270M: fp32 and int8 2e-6,
# float16 (rounded after every operator) 2e-3.
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-5, "w8a16": 1e-5, "w8a16_folded": 1e-5, "fp16": 1e-2}
BEFORE_HEAD = "lm_head (choice of the last position before it)"


def first_divergence(
    hf: TorchSource,
    patched: TorchSource,
    same_weights: TorchSource,
    *,
    strict: StrictSource,
    cases: Sequence[Case],
    scheme: str,
) -> Divergence | None:
    """The first place where patched leaves hf, or else the artifact leaves the reference with its weights.

    None when nothing can be named.

    Args:
        same_weights: the torch source with the artifact's own weights.
    """
    case = cases[0]
    found = torch_divergence(hf, patched, case, tolerance=TOLERANCE)
    if found is not None and found.error > found.tolerance:
        return found
    worst: Divergence | None = None
    for row in range(len(case.prompts)):  # rows differ in padding, and only one of them may be wrong
        found = artifact_divergence(same_weights, strict, case, row=row, tolerance=TOLERANCES[Scheme(scheme).form])
        if found is not None and not found.error <= found.tolerance:
            return found
        worst = max(filter(None, (worst, found)), key=lambda each: each.error, default=None)
    return worst


def artifact_divergence(
    same_weights: TorchSource, strict: StrictSource, case: Case, *, row: int, tolerance: float
) -> Divergence | None:
    """Give each layer of the artifact the reference's input and compare its output, in one row of the batch."""
    layers = range(strict.layers)
    wanted = {EMBEDDED, NORMED} | {f"model.layers.{i}.out" for i in layers}
    expected: dict[str, np.ndarray] = {}
    same_weights.modules(case, row, wanted.__contains__, keep=expected.__setitem__)
    prompt = len(case.prompts[row])

    def errors() -> Iterator[tuple[str, str, float]]:
        state = strict.start(case)
        strict.embed(state)
        yield EMBEDDED, *errors_by_phase(expected[EMBEDDED], state.rows(EMBEDDED)[row], prompt, tolerance=tolerance)
        for i in layers:
            out = f"model.layers.{i}.out"
            state = _start_at(strict, case, row, layer_input(i), expected[layer_input(i)])
            strict.layer(i, [state])
            yield out, *errors_by_phase(expected[out], state.rows(out)[row], prompt, tolerance=tolerance)
        state = _start_at(strict, case, row, layer_input(strict.layers), expected[layer_input(strict.layers)])
        strict.finish([state])
        yield NORMED, *errors_by_phase(expected[NORMED], state.rows(NORMED)[row], prompt, tolerance=tolerance)
        yield BEFORE_HEAD, *errors_by_phase(expected[NORMED], state.rows(CHOSEN)[row], prompt, tolerance=tolerance)
        for phase, rows in (("prefill", slice(prompt - 1, prompt)), ("decode", slice(prompt, prompt + 8))):
            if len(entering := expected[NORMED][rows]):
                yield (
                    "lm_head.out",
                    phase,
                    relative_error(same_weights.head(entering), strict.head(entering, phase == "prefill")),
                )

    found = first_or_worst(same_weights.name, strict.name, errors(), tolerance=tolerance)
    if found is None or not found.module.startswith(LAYERS):
        return found
    layer = int(found.module.split(".")[2])
    return _inside(same_weights, strict, case, row, layer, expected[layer_input(layer)], tolerance) or found


def _inside(
    same_weights: TorchSource,
    strict: StrictSource,
    case: Case,
    row: int,
    layer: int,
    entering: np.ndarray,
    tolerance: float,
) -> Divergence | None:
    """The first module inside a layer that leaves tolerance."""
    spec = same_weights.checkpoint.config.layers[layer]
    prefix, graph = spec.prefix, strict.graphs["iter1"]
    whole = (
        f"{prefix}{spec.groups[0].observed}.out" in graph.values
    )  # else ranks have shares of what is between linears
    points = [prefix + name for name in spec.points()]
    inside = [name for name in points if (whole and name.endswith(".in")) or name in graph.values]
    expected: dict[str, np.ndarray] = {}
    same_weights.modules(case, row, inside.__contains__, keep=expected.__setitem__)
    state = _start_at(strict, case, row, layer_input(layer), entering)
    strict.layer(layer, [state], extra=[name for name in inside if name in expected])
    prompt = len(case.prompts[row])
    ordered = (name for name in inside if name in expected)
    errors = (
        (name, *errors_by_phase(expected[name], state.rows(name)[row], prompt, tolerance=tolerance)) for name in ordered
    )
    found = first_or_worst(same_weights.name, strict.name, errors, tolerance=tolerance)
    if found is None or found.error <= found.tolerance:
        return None
    between = {f"{prefix}{one.output}.in": f"{prefix}{one.module} ({one.between})" for one in spec.branches}
    module = between.get(found.module, found.module.removesuffix(".out"))
    return Divergence(**{**asdict(found), "module": module})


def _start_at(strict: StrictSource, case: Case, row: int, name: str, hidden: np.ndarray) -> CaseState:
    """A case that has come as far as `name`, one row with the given values [prompt + steps, H], others with zeros."""
    state = strict.start(case)
    batch, width, prompt = len(case.prompts), state.contract.prefill, len(case.prompts[row])
    hidden = hidden * np.float32(2.0 ** -strict.rescaling.of(name))
    dtype = strict.graphs["iter1"].values[name].dtype
    numpy_dtype = dtype.numpy() if dtype is not None else np.dtype(np.float32)
    state.prefill[name] = np.zeros((batch, width, hidden.shape[1]), numpy_dtype)
    state.prefill[name][row, width - prompt :] = hidden[:prompt]
    for step, feeds in enumerate(state.steps):
        feeds[name] = np.zeros((batch, 1, hidden.shape[1]), numpy_dtype)
        feeds[name][row, 0] = hidden[prompt + step]
    return state
