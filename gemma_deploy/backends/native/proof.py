"""How an artifact of `backend.type: native` is proven: exact on dequantized weights, then as its kernels round."""

from __future__ import annotations

from gemma_deploy.backends.base import Proof
from gemma_deploy.backends.native.adapters import form_of, read_kept
from gemma_deploy.backends.native.gates import native_adapter_gates, native_gates
from gemma_deploy.backends.native.source import SHIPPED, STRICT, NativeSource
from gemma_deploy.parity.compare import ParityResult, compare_sources, effect_of, judged, measures_of
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.parity.sources import LogitSource
from gemma_deploy.parity.torch_sources import adapted_sources, torch_sources


def prove_plan(proof: Proof, result: ParityResult) -> None:
    """Compare and judge; see `Backend.prove`."""
    artifact, opened, manifest, cases = proof.artifact, proof.checkpoint, proof.manifest, proof.cases
    models: tuple[TorchSource, ...]
    adapter, screened = None, manifest.contract.candidates is not None
    if proof.adapter is None:
        models = torch_sources(opened, artifact, manifest)
        gates = native_gates(manifest.scheme, manifest.int8_cache, screened=screened)
    else:
        models = adapted_sources(opened, artifact, manifest, directory=proof.adapter.directory)
        gates = native_adapter_gates(manifest.scheme, manifest.int8_cache, screened=screened)
        adapter = read_kept(proof.adapter.kept, manifest.contract.adapters)
    reference = models[0].name
    form = form_of(manifest)
    ours = (NativeSource(artifact, kernels, adapter=adapter, form=form) for kernels in (STRICT, SHIPPED))
    all_sources: list[LogitSource] = [*models, *ours]
    sources = {source.name: source for source in all_sources}
    pairs = list(dict.fromkeys([*(gate.pair for gate in gates), (reference, STRICT), (STRICT, SHIPPED)]))
    found = compare_sources(sources, pairs, cases, vocab_size=opened.config.vocab_size, report=proof.report)
    result.lines = judged(gates, found)
    result.measures = measures_of(found)
    result.effect = effect_of(found[reference, SHIPPED], cases)
