"""Names the first module of ONNX Runtime's graph that leaves tolerance."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from gemma_deploy.backends.onnxruntime.source import DynamicSource
from gemma_deploy.parity.bisect import (
    EMBEDDED,
    NORMED,
    TOLERANCE,
    Divergence,
    errors_by_phase,
    first_or_worst,
    torch_divergence,
)
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.reference import TorchSource

# Of a value that all layers before it had a part in (real 270M, 700 tokens: 1e-4 behind a norm of layer 7).
ACCUMULATED = 1e-3


def dynamic_divergence(
    hf: TorchSource, patched: TorchSource, same_weights: TorchSource, *, artifact: Path, case: Case
) -> Divergence | None:
    """The same for a graph of ONNX Runtime, its kernels made exact: modules in order, from the model's own input on."""
    found = torch_divergence(hf, patched, case, tolerance=TOLERANCE)
    if found is not None and found.error > found.tolerance:
        return found
    return graph_divergence(same_weights, artifact=artifact, case=case)


def graph_divergence(
    same_weights: TorchSource,
    *,
    artifact: Path,
    case: Case,
    adapter: Mapping[str, np.ndarray] | None = None,
    divided: Collection[str] = (),
) -> Divergence | None:
    """Compare what modules of the graph make with a model that has its weights.

    Args:
        adapter: see `DynamicSource`; `same_weights` has it as well.
        divided: paths of modules that make something else in the graph, which calibration divided by factors.
    """
    layers = same_weights.checkpoint.config.layers
    points = [f"{layer.prefix}{name}" for layer in layers for name in (*layer.points(), "out")]
    inside = [name for name in points if not name.endswith(".in") and name.removesuffix(".out") not in divided]
    source = DynamicSource(artifact, "strict", watched=[EMBEDDED, *inside], adapter=adapter)
    hidden = source.run([Case(case.name, case.prompts[:1], case.forced[:1])])[0][0]
    got = {name: np.concatenate(pieces) for name, pieces in source.values.items()} | {NORMED: hidden}
    expected: dict[str, np.ndarray] = {}
    same_weights.modules(case, 0, got.__contains__, keep=expected.__setitem__)
    prompt = len(case.prompts[0])
    names = [name for name in (EMBEDDED, *inside, NORMED) if name in expected and name in got]
    errors = ((name, *errors_by_phase(expected[name], got[name], prompt, tolerance=ACCUMULATED)) for name in names)
    return first_or_worst(same_weights.name, source.name, errors, tolerance=ACCUMULATED)
