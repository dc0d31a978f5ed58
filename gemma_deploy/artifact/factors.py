"""Factors that calibration put into the linears of an artifact that takes adapters, which are folded into those too.

What a linear reads was divided by them and its columns were multiplied; where rows of another linear make what is
read, those rows were divided.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.names import COLUMN_FACTOR


@dataclass(frozen=True)
class LinearFactors:
    """Factors by the path of a linear, float32; without calibration there are none.

    Args:
        columns: [in] by which its columns were multiplied.
        rows: [out] by which its rows were divided.
        norms: paths of the norms whose gain was divided, so that what they make is.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    norms: frozenset[str] = frozenset()


def linear_factors(weights: ArtifactWeights) -> LinearFactors:
    """Those of an artifact that takes adapters at run time, which keeps them; of any other, none."""
    stored = weights.column_factors()
    if not stored:
        return LinearFactors()
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    norms: set[str] = set()
    for layer in weights.config.layers:
        for group in layer.groups:
            factors = stored[f"{layer.prefix}{group.observed}.{COLUMN_FACTOR}"]
            columns |= {f"{layer.prefix}{reader}": factors for reader in group.readers}
            if group.norm:
                norms.add(f"{layer.prefix}{group.norm}")
            if group.maker:
                divided, shared = factors, layer.feeding_rows(group)
                if shared is not None:
                    divided = np.ones(layer.linear(group.maker).out_features, np.float32)
                    divided[list(shared)] = factors
                rows[f"{layer.prefix}{group.maker}"] = divided
    return LinearFactors(columns, rows, frozenset(norms))
