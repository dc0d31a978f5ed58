"""What the report's pictures show: SQNR, sensitivity, activation ranges and sizes, taken from a manifest's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from gemma_deploy.artifact.charts import Bars, Chart, bars, column_chart, line_chart
from gemma_deploy.calibration.points import LABELS, split_point
from gemma_deploy.names import FP16_MAX, HEAD, MIB
from gemma_deploy.params.table import ParamRow
from gemma_deploy.tables import figure

SQNR_GATE_DB = 38
Value = TypeVar("Value", float, float | None)


def sqnr_plot(rows: Sequence[ParamRow]) -> Chart | None:
    """SQNR of every quantized matrix over its layer, a line for each kind; None when nothing was quantized.

    Args:
        rows: of the manifest's parameter table; of ranks, the lowest of a matrix counts.
    """
    kinds: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.sqnr_db is not None and ".layers." in row.name and math.isfinite(row.sqnr_db):
            _, _, layer, *module = row.name.split(".")
            line = kinds.setdefault(module[-2], {})
            line[int(layer)] = min(row.sqnr_db, line.get(int(layer), math.inf))
    if not kinds:
        return None
    lowest = min(value for line in kinds.values() for value in line.values())
    # Far below the gate's line it would only press the others together.
    near = lowest < SQNR_GATE_DB + 6 and lowest > SQNR_GATE_DB - 12
    rule = (float(SQNR_GATE_DB), f"the gate's limit for a layer of 8 bits, {SQNR_GATE_DB} dB") if near else None
    return line_chart(kinds, label="SQNR by layer", unit="dB", rule=rule)


def sensitivity_plot(losses: Sequence[float]) -> Chart | None:
    """What the model loses when one layer alone is quantized, a column for each; None when it was not measured.

    Args:
        losses: mean KL in nats a token, by layer.
    """
    if not losses:
        return None
    return column_chart(losses, label="mean KL when this layer alone is quantized", unit="nats")


def ranges_of(absmax: Mapping[str, Value]) -> dict[str, Value]:
    """Of all measured points those that are drawn: what linears read, and layers make."""
    return {point: value for point, value in absmax.items() if split_point(point)[0] is not None and _kind(point)}


def range_plot(absmax: Mapping[str, float | None]) -> Chart | None:
    """Largest magnitude of what linears read and layers make, over the layer; None when nothing was measured.

    Args:
        absmax: `model.layers.N.KIND` -> largest magnitude, None where it was not finite; other points are left out.
    """
    kinds: dict[str, dict[int, float]] = {}
    for point, value in ranges_of(absmax).items():
        if value is None or not (
            math.isfinite(value) and value > 0
        ):  # it was NaN or infinite, or is not on a log scale
            continue
        layer, _ = split_point(point)
        assert layer is not None
        kinds.setdefault(_kind(point), {})[layer] = value
    if not kinds:
        return None
    ordered = {name: kinds[name] for name in LABELS.values() if name in kinds}
    rule = (FP16_MAX, "largest float16, 65504")
    return line_chart(ordered, label="largest magnitude by layer", unit="", log=True, rule=rule)


def size_plot(rows: Sequence[ParamRow]) -> Bars:
    """Bytes of each kind of tensor, largest first."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(f"{_kind_of_tensor(row.name)}, {row.dtype}", []).append(row.nbytes)
    largest = sorted(groups.items(), key=lambda item: (-sum(item[1]), item[0]))
    found = [
        (kind, sum(sizes) / MIB, f"{figure(sum(sizes) / MIB)} MiB in {len(sizes)} tensors") for kind, sizes in largest
    ]
    return bars(found, label=f"parameters: {figure(sum(row.nbytes for row in rows) / MIB)} MiB")


def _kind_of_tensor(name: str) -> str:
    if name.endswith(".scaling"):
        return "attention scale factors"
    if "rotary_emb" in name:
        return "rotary tables"
    if "norm" in name:
        return "norms"
    if name.startswith(HEAD):
        return "LM head"
    return "token table" if "embed_tokens" in name else "linears"


def _kind(point: str) -> str:
    """How tables call it, empty of a point that is not drawn."""
    return LABELS.get(split_point(point)[1], "")
