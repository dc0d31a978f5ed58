"""The torch side of a proof: transformers' class, the patched class, and that with an artifact's weights."""

from __future__ import annotations

from pathlib import Path

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.parity.gates import SAME_WEIGHTS
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.schemes import Scheme, Storage


def torch_sources(
    opened: Checkpoint, artifact: Path, manifest: Manifest
) -> tuple[TorchSource, TorchSource, TorchSource]:
    """hf, patched, and the reference: the patched model, with the artifact's own weights where those are codes."""
    scheme, scale = manifest.scheme, manifest.embed_scale
    hf = TorchSource(opened, "hf", "bf16" if scheme == "bf16" else "fp32", embed_scale=scale)
    patched = TorchSource(opened, "patched", "bf16" if scheme == "bf16" else "fp32", embed_scale=scale)
    same_weights = patched
    if scheme == "w8a16" and manifest.storage == Storage():
        same_weights = TorchSource(opened, "patched", "w8a16", embed_scale=scale)
    elif Scheme(scheme).codes:
        weights = ArtifactWeights(opened.config, artifact, manifest)
        same_weights = TorchSource(weights, "patched", "fp32", embed_scale=scale, name=SAME_WEIGHTS[scheme])
    return hf, patched, same_weights
