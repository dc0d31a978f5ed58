"""Which measured number decides, and where its limit is. One row per gate; docs/proof-and-ledger.md has them all.

A limit may be loosened only with the measured value, the mechanism, and the bisect result written beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gemma_deploy.artifact.gate_rows import at_least
from gemma_deploy.names import FP16_MAX
from gemma_deploy.params.table import ParamRow
from gemma_deploy.parity.metrics import Metrics
from gemma_deploy.quantization.rescaling import HEADROOM, Rescaling
from gemma_deploy.schemes import QUANTIZERS

LOWEST_SQNR_DB = 38.0
STORED_WEIGHTS = "checkpoint = stored weights"  # the comparison of weights.py
PEFT = "peft"
MERGE = PEFT, "merged"  # the comparison of merged.py
# Its limit: float32 in another order of sums. Real 270M behind its window 2.3e-6; tiny models whose updates are as
# large as their weights up to 6.6e-6.
MERGE_LIMIT = 1e-5
# PEFT beside the weights of an artifact, which repeats it. Real 270M with a random adapter of rank 16, int8, 288
# positions behind its window: 2.4e-6, and 1.9e-5 at one where PEFT itself is 8.6e-6 from float64, the graph 7.2e-6 and
# float32 products of merged weights 1.4e-5. Tiny models up to 6.4e-6.
ADAPTER_LIMIT = 5e-5
FOLDED_LIMIT = 1e-4  # where factors of calibration were taken out of the weights in float32: tiny models up to 1.5e-5
BFLOAT16_KL = 0.01  # that of int8, which rounds weights more coarsely; tiny models up to 1.0e-4


@dataclass(frozen=True)
class Gate:
    """A limit on one measure of one comparison.

    Args:
        pair: names of the reference and the tested source.
        measure: a field of `Metrics`; `ppl_delta` is judged less two standard errors.
        limit: the largest value that passes.
        cases: whose positions count; with more than one measure of the same kind, the worst decides.
        pooled: judge prefill and decode together (a mean over few positions says little).
    """

    pair: tuple[str, str]
    measure: str
    limit: float
    cases: tuple[str, ...] = ("text", "random")
    pooled: bool = False


@dataclass(frozen=True)
class Line:
    """One gate's outcome."""

    comparison: str
    name: str
    value: float
    limit: float
    passed: bool

    def __str__(self) -> str:
        sign = ">=" if at_least(self.name) else "<="
        return f"{self.comparison}: {self.name} {self.value:.3g}, must be {sign} {self.limit:g}"

    def to_json(self) -> dict[str, Any]:
        """Plain dict; a value that is no number becomes None."""
        return asdict(self) | {"value": self.value if math.isfinite(self.value) else None}


def relative(limit: float, *pairs: tuple[str, str]) -> tuple[Gate, ...]:
    """Gates on the largest logit error, relative to the largest logit."""
    return tuple(Gate(pair, "relative", limit) for pair in pairs)


def near(pair: tuple[str, str], limit: float) -> tuple[Gate, ...]:
    """Finite logits, and a mean KL on text."""
    return Gate(pair, "bad_test", 0), Gate(pair, "kl_mean", limit, ("text",), pooled=True)


# patched = hf holds for every scheme: the patch changes no number.
GATES: dict[str, tuple[Gate, ...]] = {
    "fp32": relative(1e-5, ("hf", "patched"), ("patched", "strict"), ("hf", "strict")),
    "bf16": relative(1e-3, ("hf bf16", "patched bf16"), ("patched bf16", "strict"), ("hf bf16", "strict")),
    "fp16": (
        *relative(1e-5, ("hf", "patched")),
        Gate(("hf", "strict"), "bad_test", 0),
        Gate(("hf", "strict"), "kl_mean", 1e-5, ("text",), pooled=True),
    ),
} | {
    scheme: (
        *relative(1e-5, ("hf", "patched"), (f"patched {scheme}", "strict")),
        Gate(("hf", "strict"), "bad_test", 0),
        Gate(("hf", "strict"), "kl_mean", quantizer.kl_limit, ("text",), pooled=True),
        Gate(("hf", "strict"), "ppl_delta", quantizer.perplexity_limit, ("text",), pooled=True),
    )
    for scheme, quantizer in QUANTIZERS.items()
}
# The reference whose numbers the artifact must repeat, for the search of the first wrong layer.
SAME_WEIGHTS = {"fp32": "patched", "bf16": "patched bf16", "fp16": "patched"}
SAME_WEIGHTS |= {scheme: f"patched {scheme}" for scheme in QUANTIZERS}


def judge(gate: Gate, measured: Mapping[tuple[str, str], Metrics], pooled: Mapping[str, Metrics]) -> Line:
    """Apply one gate.

    Args:
        measured: (case, phase) -> metrics of the gate's pair; pooled: case -> metrics over both phases.

    Returns:
        A line that has failed when a logit is not finite or nothing was compared, whatever the measure.
    """
    chosen = (
        [metrics for case, metrics in pooled.items() if case in gate.cases]
        if gate.pooled
        else [metrics for (case, _), metrics in measured.items() if case in gate.cases]
    )
    name = {"kl_mean": "mean KL", "ppl_delta": "perplexity change less 2 standard errors", "relative": "relative error",
            "bad_test": "inf or NaN logits", "overturned": "largest lead overturned"}[gate.measure]  # fmt: skip
    values = [_value(metrics, gate.measure) for metrics in chosen]
    bad = not values or any(not math.isfinite(value) for value in values)
    bad = bad or any(metrics.bad_test or metrics.bad_reference for metrics in chosen)
    value = math.nan if not values or any(math.isnan(value) for value in values) else max(values)
    return Line(" = ".join(gate.pair), name, value, gate.limit, not bad and value <= gate.limit)


def headroom_line(absmax: Mapping[str, float], rescaling: Rescaling) -> Line:
    """How far the largest activation stays below float16's largest number (a factor, at least 4), as it is stored."""
    stored = {
        point: found / 2.0 ** rescaling.of(point)
        for point, found in absmax.items()
        if not rescaling.is_in_float32(point)
    }
    where = max(stored, key=lambda point: _worst_first(stored[point], -stored[point]), default="nothing")
    largest, exponent = stored.get(where, math.nan), rescaling.of(where)
    factor = FP16_MAX / largest if largest else math.inf
    scale = f", divided by 2**{exponent}" if exponent else ""
    name = f"headroom of float16 ({where} reaches {largest * 2.0**exponent:.4g}{scale})"
    return Line("hf", name, factor, HEADROOM, factor >= HEADROOM)


def sqnr_line(rows: Sequence[ParamRow]) -> Line:
    """The worst decoder layer: signal to quantization noise ratio over its seven matrices together, in dB.

    One matrix alone may lie lower: 37.85 dB is the best that one scale per row gives layers.5.self_attn.k_proj of the
    real 270M (37.93 dB with the scale of least squared error instead of absmax). Neither is the token table judged
    here: rows of rare tokens have outliers (34.5 dB there). What both cost is measured by the KL gate; both figures
    stand in the ledger.
    """
    energies: dict[int, tuple[float, float]] = {}
    for row in rows:
        if row.signal_energy is not None and ".layers." in row.name:
            layer, signal = int(row.name.split(".")[2]), row.signal_energy
            noise = 0.0 if row.sqnr_db is None else signal / 10 ** (row.sqnr_db / 10)
            before = energies.get(layer, (0.0, 0.0))
            energies[layer] = (before[0] + signal, before[1] + noise)
    ratios = {
        layer: math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
        for layer, (signal, noise) in energies.items()
    }
    worst = max(ratios, key=lambda layer: _worst_first(ratios[layer], ratios[layer]), default=None)
    value = math.nan if worst is None else ratios[worst]
    return Line("weights", f"lowest SQNR in dB (layer {worst})", value, LOWEST_SQNR_DB, value >= LOWEST_SQNR_DB)


def _worst_first(value: float, rank: float) -> tuple[bool, float]:
    """A key under which `max` finds NaN, and without one the lowest rank."""
    return math.isnan(value), -rank


def _value(metrics: Metrics, measure: str) -> float:
    value = float(getattr(metrics, measure))
    return value - 2 * metrics.ppl_error if measure == "ppl_delta" else value
