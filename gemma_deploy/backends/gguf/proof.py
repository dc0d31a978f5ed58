"""How a file for llama.cpp is proven: as this program reads it back, exact; then what llama.cpp computes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.backends.base import Proof
from gemma_deploy.backends.gguf.gates import STRICT, gguf_gates
from gemma_deploy.backends.gguf.source import ENGINE, LLAMA, LlamaSource
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.names import GGUF
from gemma_deploy.parity.compare import ParityResult, compare_sources, effect_of, judged, measures_of
from gemma_deploy.parity.reference import TorchSource, Weighting
from gemma_deploy.parity.sources import LogitSource
from gemma_deploy.parity.torch_sources import torch_sources


def strict_source(file: Path, manifest: Manifest) -> TorchSource:
    """A file as this program reads it, in float32; of bfloat16 weights in that."""
    weighting: Weighting = "bf16" if manifest.scheme == "bf16" else "fp32"
    return TorchSource(Checkpoint.open(file), "patched", weighting, embed_scale=manifest.embed_scale, name=STRICT)


def prove_file(proof: Proof, result: ParityResult) -> None:
    """Compare and judge; see `Backend.prove`."""
    ENGINE.check()  # before any work
    opened, manifest, cases, file = proof.checkpoint, proof.manifest, proof.cases, proof.artifact / GGUF
    models = torch_sources(opened, proof.artifact, manifest)
    strict = strict_source(file, manifest)
    with closing(LlamaSource(file)) as llama:
        all_sources: list[LogitSource] = [*models, strict, llama]
        sources = {source.name: source for source in all_sources}
        gates = gguf_gates(manifest.scheme)
        pairs = list(dict.fromkeys(gate.pair for gate in gates))
        found = compare_sources(sources, pairs, cases, vocab_size=opened.config.vocab_size, report=proof.report)
    result.lines = judged(gates, found)
    result.measures = measures_of(found)
    result.effect = effect_of(found[models[0].name, LLAMA], cases)
