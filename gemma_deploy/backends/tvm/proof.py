"""How a compiled pair is proven: TVM's numbers against transformers with the artifact's weights."""

from __future__ import annotations

from gemma_deploy.backends.base import Proof
from gemma_deploy.backends.tvm.source import CompiledSource
from gemma_deploy.backends.tvm.target import file_of, runs_here
from gemma_deploy.backends.tvm_vacc.proof import prove_pair
from gemma_deploy.parity.compare import ParityResult, compare_sources, effect_of, judged, measures_of
from gemma_deploy.parity.gates import GATES
from gemma_deploy.parity.sources import LogitSource
from gemma_deploy.parity.torch_sources import torch_sources


def prove_compiled(proof: Proof, result: ParityResult) -> None:
    """Compare and judge; see `Backend.prove`. Of a library for another machine the graphs alone, in ONNX Runtime."""
    opened, manifest, cases = proof.checkpoint, proof.manifest, proof.cases
    triple, cpu = manifest.contract.triple or "", manifest.contract.cpu or ""
    if not runs_here(triple, cpu):
        prove_pair(proof, result)
        result.notes.append(
            f"{file_of(triple)} is for {triple} ({cpu}) and was not run: its graphs were, in ONNX Runtime"
        )
        return
    models = torch_sources(opened, proof.artifact, manifest)
    compiled = CompiledSource(proof.artifact)
    all_sources: list[LogitSource] = [*models, compiled]
    sources = {source.name: source for source in all_sources}
    gates = GATES[manifest.scheme]
    pairs = list(dict.fromkeys([*(gate.pair for gate in gates), (models[0].name, compiled.name)]))
    found = compare_sources(sources, pairs, cases, vocab_size=opened.config.vocab_size, report=proof.report)
    result.lines = judged(gates, found)
    result.measures = measures_of(found)
    result.effect = effect_of(found[models[0].name, compiled.name], cases)
