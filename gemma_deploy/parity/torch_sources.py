"""The torch side of a proof: transformers' class, the patched class, and one of them with an artifact's weights."""

from __future__ import annotations

from pathlib import Path

import torch

from gemma_deploy.artifact.ledger import takes_over
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.parity.adapted import PeftSource
from gemma_deploy.parity.gates import PEFT, SAME_WEIGHTS
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.parity.unfolded import UnfoldedWeights
from gemma_deploy.schemes import Scheme, Storage


def torch_sources(
    opened: Checkpoint, artifact: Path, manifest: Manifest
) -> tuple[TorchSource, TorchSource, TorchSource]:
    """hf, patched, and the reference: the patched model, with the artifact's own weights where those are codes."""
    scheme, scale = manifest.scheme, manifest.embed_scale
    hf = TorchSource(opened, "hf", "bf16" if scheme == "bf16" else "fp32", embed_scale=scale)
    patched = TorchSource(opened, "patched", "bf16" if scheme == "bf16" else "fp32", embed_scale=scale)
    same_weights = patched
    if scheme == "w8a16" and manifest.storage == Storage() and not takes_over(manifest):
        same_weights = TorchSource(opened, "patched", "w8a16", embed_scale=scale)
    elif Scheme(scheme).codes:
        weights = ArtifactWeights(opened.config, artifact, manifest)
        same_weights = TorchSource(weights, "patched", "fp32", embed_scale=scale, name=SAME_WEIGHTS[scheme])
    return hf, patched, same_weights


def adapted_sources(
    opened: Checkpoint, artifact: Path, manifest: Manifest, *, directory: Path
) -> tuple[PeftSource, PeftSource]:
    """PEFT's model of an adapter, nothing merged: on the checkpoint, and on the artifact's own weights.

    Args:
        directory: that peft's save_pretrained wrote.
    """
    adapters, size, scale = [(directory, 1.0)], opened.config.vocab_size, manifest.embed_scale
    peft = PeftSource(opened, adapters, vocab_size=size, embed_scale=scale, name=PEFT)
    if manifest.scheme == "fp32":
        return peft, peft
    own = UnfoldedWeights(opened, artifact, manifest)
    rounding = torch.bfloat16 if manifest.scheme == "bf16" else None
    name = f"{PEFT} {manifest.scheme}"
    return peft, PeftSource(own, adapters, vocab_size=size, embed_scale=scale, rounding=rounding, name=name)
