"""Names the first layer and operator that leave tolerance.

Every layer of the artifact is given the *reference's* input, so what it shows is its own error and not what came down
from the layers before. Inside the first wrong layer its modules are compared in the order they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.dynamic import DynamicSource
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.parity.segments import CHOSEN, EMBEDDED, NORMED, CaseState, StrictSource, layer_input
from gemma_deploy.schemes import stored_scheme

# Largest local error of a sound layer, relative to its largest output. Measured on the real 270M: fp32 and int8 2e-6,
# float16 (rounded after every operator) 2e-3.
# Of a value that all layers before it had a part in (real 270M, 700 tokens: 1e-4 behind a norm of layer 7).
ACCUMULATED = 1e-3
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-5, "w8a16": 1e-5, "w8a16_folded": 1e-5, "fp16": 1e-2}
# Modules of a layer in the order they run; a trailing `.in` is what reaches a linear from operators without a name.
ORDER = (
    "input_layernorm.out", "self_attn.q_proj.out", "self_attn.k_proj.out", "self_attn.v_proj.out",
    "self_attn.q_norm.out", "self_attn.k_norm.out", "self_attn.o_proj.in", "self_attn.o_proj.out",
    "post_attention_layernorm.out", "pre_feedforward_layernorm.out", "mlp.gate_proj.out", "mlp.act_fn.out",
    "mlp.up_proj.out", "mlp.down_proj.in", "mlp.down_proj.out", "post_feedforward_layernorm.out",
)  # fmt: skip
BETWEEN = {
    "self_attn.o_proj.in": "self_attn (rotary embedding, mask, softmax or cache)",
    "mlp.down_proj.in": "mlp (product of activation and up_proj)",
    CHOSEN: "lm_head (choice of the last position before it)",
}


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


def first_divergence(
    hf: TorchSource, patched: TorchSource, twin: TorchSource, strict: StrictSource, cases: Sequence[Case], scheme: str
) -> Divergence | None:
    """The first place where patched leaves hf or else the artifact leaves its twin; None when nothing can be named.

    Args:
        twin: the torch source with the artifact's own weights.
    """
    case = cases[0]
    found = torch_divergence(hf, patched, case, TOLERANCES["fp32"])
    if found is not None and found.error > found.tolerance:
        return found
    worst: Divergence | None = None
    for row in range(len(case.prompts)):  # rows differ in padding, and only one of them may be wrong
        found = artifact_divergence(twin, strict, case, row, TOLERANCES[stored_scheme(scheme)])
        if found is not None and not found.error <= found.tolerance:
            return found
        worst = max(filter(None, (worst, found)), key=lambda each: each.error, default=None)
    return worst


def dynamic_divergence(
    hf: TorchSource, patched: TorchSource, twin: TorchSource, artifact: Path, case: Case
) -> Divergence | None:
    """The same for a graph of ONNX Runtime, its kernels made exact: modules in order, from the model's own input on."""
    found = torch_divergence(hf, patched, case, TOLERANCES["fp32"])
    if found is not None and found.error > found.tolerance:
        return found
    layers = range(hf.checkpoint.config.num_hidden_layers)
    inside = [f"model.layers.{i}.{name}" for i in layers for name in (*ORDER, "out") if not name.endswith(".in")]
    source = DynamicSource(artifact, "strict", watched=[EMBEDDED, *inside])
    hidden = source.run([Case(case.name, case.prompts[:1], case.forced[:1])])[0][0]
    got = {name: np.concatenate(pieces) for name, pieces in source.values.items()} | {NORMED: hidden}
    expected: dict[str, np.ndarray] = {}
    twin.modules(case, 0, got.__contains__, expected.__setitem__)
    prompt = len(case.prompts[0])
    names = [name for name in (EMBEDDED, *inside, NORMED) if name in expected and name in got]
    errors = ((name, *_errors(expected[name], got[name], prompt, ACCUMULATED)) for name in names)
    return _first_or_worst(twin.name, source.name, errors, ACCUMULATED)


def torch_divergence(hf: TorchSource, patched: TorchSource, case: Case, tolerance: float) -> Divergence | None:
    """Compare what every module makes, in the order the reference runs them."""
    names = {f"model.layers.{i}.{name}" for i in range(hf.checkpoint.config.num_hidden_layers) for name in ORDER}
    names |= {f"model.layers.{i}.out" for i in range(hf.checkpoint.config.num_hidden_layers)} | {EMBEDDED, NORMED}
    expected: dict[str, np.ndarray] = {}
    hf.modules(case, 0, names.__contains__, expected.__setitem__)
    got: dict[str, np.ndarray] = {}
    patched.modules(case, 0, expected.__contains__, got.__setitem__)
    prompt, names_made = len(case.prompts[0]), [name for name in expected if name in got]
    errors = ((name, *_errors(expected[name], got[name], prompt, tolerance)) for name in names_made)
    return _first_or_worst(hf.name, patched.name, errors, tolerance)


def artifact_divergence(
    twin: TorchSource, strict: StrictSource, case: Case, row: int, tolerance: float
) -> Divergence | None:
    """Give each layer of the artifact the twin's input and compare what it makes of it, in one row of the batch."""
    layers = range(strict.layers)
    wanted = {EMBEDDED, NORMED} | {f"model.layers.{i}.out" for i in layers}
    expected: dict[str, np.ndarray] = {}
    twin.modules(case, row, wanted.__contains__, expected.__setitem__)
    prompt = len(case.prompts[row])

    def errors() -> Iterator[tuple[str, str, float]]:
        state = strict.start(case)
        strict.embed(state)
        yield EMBEDDED, *_errors(expected[EMBEDDED], state.rows(EMBEDDED)[row], prompt, tolerance)
        for i in layers:
            out = f"model.layers.{i}.out"
            state = _start_at(strict, case, row, layer_input(i), expected[layer_input(i)])
            strict.layer(i, [state])
            yield out, *_errors(expected[out], state.rows(out)[row], prompt, tolerance)
        state = _start_at(strict, case, row, layer_input(strict.layers), expected[layer_input(strict.layers)])
        strict.finish([state])
        yield NORMED, *_errors(expected[NORMED], state.rows(NORMED)[row], prompt, tolerance)
        yield BETWEEN[CHOSEN], *_errors(expected[NORMED], state.rows(CHOSEN)[row], prompt, tolerance)
        for phase, rows in (("prefill", slice(prompt - 1, prompt)), ("decode", slice(prompt, prompt + 8))):
            if len(entering := expected[NORMED][rows]):
                yield "lm_head.out", phase, _relative(twin.head(entering), strict.head(entering, phase == "prefill"))

    found = _first_or_worst(twin.name, strict.name, errors(), tolerance)
    if found is None or not found.module.startswith("model.layers."):
        return found
    layer = int(found.module.split(".")[2])
    return _inside(twin, strict, case, row, layer, expected[layer_input(layer)], tolerance) or found


def _inside(
    twin: TorchSource, strict: StrictSource, case: Case, row: int, layer: int, entering: np.ndarray, tolerance: float
) -> Divergence | None:
    """The first module inside a layer that leaves tolerance."""
    prefix = f"model.layers.{layer}."
    graph = strict.graphs["iter1"]
    whole = f"{prefix}self_attn.q_proj.out" in graph.values  # else every rank has shares of what lies between linears
    inside = [prefix + name for name in ORDER if (whole and name.endswith(".in")) or prefix + name in graph.values]
    expected: dict[str, np.ndarray] = {}
    twin.modules(case, row, inside.__contains__, expected.__setitem__)
    state = _start_at(strict, case, row, layer_input(layer), entering)
    strict.layer(layer, [state], extra=[name for name in inside if name in expected])
    prompt = len(case.prompts[row])
    ordered = (name for name in inside if name in expected)
    errors = ((name, *_errors(expected[name], state.rows(name)[row], prompt, tolerance)) for name in ordered)
    found = _first_or_worst(twin.name, strict.name, errors, tolerance)
    if found is None or found.error <= found.tolerance:
        return None
    local = found.module.removeprefix(prefix)
    return Divergence(**{**asdict(found), "module": prefix + BETWEEN.get(local, local.removesuffix(".out"))})


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


def _errors(expected: np.ndarray, got: np.ndarray, prompt: int, tolerance: float) -> tuple[str, float]:
    """A phase and its error: prefill when it is wrong already, else the phase with the larger error."""
    count = min(len(expected), len(got))  # the prefill graph may keep the last positions only
    steps = len(expected) - prompt
    reference, test = expected[-count:], got[-count:]
    parts = {"prefill": slice(0, count - steps), "decode": slice(count - steps, count)}
    errors = {phase: _relative(reference[part], test[part]) for phase, part in parts.items() if len(reference[part])}
    wrong = [name for name, error in errors.items() if not error <= tolerance]
    phase = wrong[0] if wrong else max(errors, key=lambda name: errors[name])
    return phase, errors[phase]


def _relative(reference: np.ndarray, test: np.ndarray) -> float:
    """Largest difference relative to the largest reference value; inf when anything is not finite."""
    largest = float(np.abs(reference - test).max()) / max(1.0, float(np.abs(reference).max()))
    return largest if np.isfinite(largest) else float("inf")


def _first_or_worst(
    reference: str, test: str, errors: Iterator[tuple[str, str, float]], tolerance: float
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
