"""Names the first layer and operator of the static pair that leave tolerance.

Every layer of the artifact is given the *reference's* input, so what it shows is its own error and not what came down
from the layers before. Inside the first wrong layer its modules are compared in the order they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from gemma_deploy.backends.tvm_vacc.segments import CHOSEN, EMBEDDED, NORMED, CaseState, StrictSource, layer_input
from gemma_deploy.names import (
    LAYERS,
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    PER_LAYER_TABLE,
    STREAM_PROJECTION,
    STREAMS,
)
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
# Modules of what layers read of tokens beside the stream, and what a layer does with it.
VECTOR_PARTS = (f"{PER_LAYER_TABLE}.out", f"{PER_LAYER_PROJECTION}.out", f"{PER_LAYER_NORM}.out")
STREAM = re.compile(rf"{re.escape(STREAM_PROJECTION)}\.\d+\.out")
OF_VECTORS = "activation, or the vectors of tokens"
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
    names = map(str, strict.graphs["iter0"].values)
    beside = [name for name in names if name in VECTOR_PARTS or STREAM.fullmatch(name)]
    wanted = {EMBEDDED, NORMED, *beside} | {f"model.layers.{i}.out" for i in layers}
    expected: dict[str, np.ndarray] = {}
    same_weights.modules(case, row, wanted.__contains__, keep=expected.__setitem__)
    prompt = len(case.prompts[row])

    def compared(state: CaseState, name: str, reference: str = "") -> tuple[str, float]:
        true = expected[reference or name]
        return errors_by_phase(true, state.rows(name)[row], prompt, tolerance=tolerance)

    def errors() -> Iterator[tuple[str, str, float]]:
        state = strict.start(case)
        strict.embed(state, beside)
        for name in (EMBEDDED, *beside):
            yield name, *compared(state, name)
        for i in layers:
            out = f"model.layers.{i}.out"
            state = _start_at(strict, case, row, i, expected)
            strict.layer(i, [state])
            yield out, *compared(state, out)
        state = _start_at(strict, case, row, strict.layers, expected)
        strict.finish([state])
        yield NORMED, *compared(state, NORMED)
        yield BEFORE_HEAD, *compared(state, CHOSEN, NORMED)
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
    return _inside(same_weights, strict, case, row, layer, expected, tolerance) or found


def _inside(
    same_weights: TorchSource,
    strict: StrictSource,
    case: Case,
    row: int,
    layer: int,
    outputs: Mapping[str, np.ndarray],
    tolerance: float,
) -> Divergence | None:
    """The first module inside a layer that leaves tolerance; `outputs` are those of layers in the reference."""
    spec = same_weights.checkpoint.config.layers[layer]
    prefix, graph = spec.prefix, strict.graphs["iter1"]
    whole = (
        f"{prefix}{spec.groups[0].observed}.out" in graph.values
    )  # else ranks have shares of what is between linears
    points = [prefix + name for name in spec.points()]
    inside = [name for name in points if (whole and name.endswith(".in")) or name in graph.values]
    expected: dict[str, np.ndarray] = {}
    same_weights.modules(case, row, inside.__contains__, keep=expected.__setitem__)
    state = _start_at(strict, case, row, layer, outputs)
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
    if spec.per_layer is not None:
        between[f"{prefix}{spec.per_layer.projection}.in"] = f"{prefix}per_layer_input ({OF_VECTORS})"
    module = between.get(found.module, found.module.removesuffix(".out"))
    return Divergence(**{**asdict(found), "module": module})


def _start_at(strict: StrictSource, case: Case, row: int, layer: int, outputs: Mapping[str, np.ndarray]) -> CaseState:
    """A case that has come as far as a layer, one row with the reference's values, others with zeros.

    Args:
        layer: its number, or that of layers for what stands behind all; outputs: [prompt + steps, H] of layers and of
            the embedding, by name.
    """
    state = strict.start(case)
    strict.embed(state)
    for source in sorted(strict.sources.get(layer, ())):  # whose keys and values it reads
        _place(strict, state, row, source, outputs)
        strict.layer(source, [state])
    _place(strict, state, row, layer, outputs)
    return state


def _place(strict: StrictSource, state: CaseState, row: int, layer: int, outputs: Mapping[str, np.ndarray]) -> None:
    """Let a layer read what the reference's own reads. In place."""
    cutter = strict.graphs["iter0"]
    name = layer_input(layer, streams=cutter.streams)
    if name == STREAMS:  # made of the embeddings, which torch has no module for
        return
    hidden = outputs[name] * np.float32(2.0 ** -strict.rescaling.of(name))
    prompt, width = len(state.case.prompts[row]), state.contract.prefill
    dtype = strict.graphs["iter1"].values[name].dtype
    numpy_dtype = dtype.numpy() if dtype is not None else np.dtype(np.float32)
    rows = len(state.case.prompts)
    if cutter.streams:
        hidden = hidden.reshape(len(hidden), -1, outputs[EMBEDDED].shape[1])
    state.prefill[name] = np.zeros((rows, width, *hidden.shape[1:]), numpy_dtype)
    state.prefill[name][row, width - prompt :] = hidden[:prompt]
    for step, feeds in enumerate(state.steps):
        feeds[name] = np.zeros((rows, 1, *hidden.shape[1:]), numpy_dtype)
        feeds[name][row, 0] = hidden[prompt + step]
    if cutter.first_at_last is not None and layer > cutter.first_at_last:
        state.cut_to_last(cutter, layer, every=False)
        state.last[0][name] = state.prefill.pop(name)[:, -1:]
