"""How a checkpoint for vLLM is proven: as transformers reads its weights, exact; then what vLLM computes."""

from __future__ import annotations

from contextlib import ExitStack, closing

from gemma_deploy.backends.base import Proof
from gemma_deploy.backends.vllm.gates import unfit_for_this_machine, vllm_gates
from gemma_deploy.backends.vllm.source import ENGINE, SHIPPED, STRICT, VllmSource, dtype_of
from gemma_deploy.parity.compare import ParityResult, compare_sources, effect_of, judged, measures_of
from gemma_deploy.parity.sources import LogitSource
from gemma_deploy.parity.torch_sources import torch_sources


def prove_checkpoint(proof: Proof, result: ParityResult) -> None:
    """Compare and judge; see `Backend.prove`."""
    ENGINE.check()  # before any work
    artifact, opened, manifest, cases = proof.artifact, proof.checkpoint, proof.manifest, proof.cases
    longest = max(len(case.sequence(row)) for case in cases for row in range(len(case.prompts)))
    unfit = unfit_for_this_machine(manifest)
    models = torch_sources(opened, artifact, manifest)
    shipped = dtype_of(manifest.scheme)
    with ExitStack() as open_sources:
        ours = [VllmSource(artifact, STRICT, dtype="float32", longest=longest)]
        if unfit is None:
            ours.append(VllmSource(artifact, SHIPPED, dtype=shipped, longest=longest))
        else:
            result.notes.append(f"not run in vLLM: {unfit}; what it would compute was not measured")
        for source in ours:
            open_sources.enter_context(closing(source))
        all_sources: list[LogitSource] = [*models, *ours]
        sources = {source.name: source for source in all_sources}
        gates = [gate for gate in vllm_gates(manifest.scheme) if set(gate.pair) <= set(sources)]
        last = (models[0].name, ours[-1].name)
        pairs = list(dict.fromkeys([*(gate.pair for gate in gates), last]))
        found = compare_sources(sources, pairs, cases, vocab_size=opened.config.vocab_size, report=proof.report)
    result.lines = judged(gates, found)
    result.measures = measures_of(found)
    result.effect = effect_of(found[last], cases)
