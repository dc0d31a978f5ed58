"""The weights of an artifact that takes adapters, without the factors that calibration put into them.

PEFT computes an adapter beside them as beside the checkpoint's own: with the adapter as PEFT saved it, and without
anything that the artifact's own form of it went through.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma_deploy.artifact.factors import linear_factors
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import Checkpoint


class UnfoldedWeights:
    """A `WeightSource`: an artifact's numbers, the factors of linears, and of norms in front of them, taken out.

    What the table's columns were multiplied by stays, and with it the final norm that was divided by it: no adapter
    beside an artifact is about either.

    Args:
        checkpoint: that the artifact was made from, whose norms are taken where a factor went into one.
        artifact: directory; manifest: its manifest.
    """

    def __init__(self, checkpoint: Checkpoint, artifact: Path, manifest: Manifest) -> None:
        self.checkpoint, self.stored = checkpoint, ArtifactWeights(checkpoint.config, artifact, manifest)
        self.factors = linear_factors(self.stored)
        self.path, self.config, self.tensors = self.stored.path, self.stored.config, self.stored.tensors

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32."""
        module, factors = name.removesuffix(".weight"), self.factors
        if module in factors.norms:
            return self.checkpoint.rows(name, start, stop)
        rows = self.stored.rows(name, start, stop)
        if module in factors.columns:
            rows = rows / factors.columns[module]
        if module in factors.rows:
            rows = rows * factors.rows[module][start:stop, None]
        return rows

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """As `rows`: there is no other form of these weights."""
        return self.rows(name, start, stop)

    def weights_fingerprint(self) -> str:
        """Of the table of what the artifact's files hold."""
        return self.stored.weights_fingerprint()

    def embedding_scale(self) -> np.ndarray | None:
        """The artifact's."""
        return self.stored.embedding_scale()
