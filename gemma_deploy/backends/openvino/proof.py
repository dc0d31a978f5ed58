"""How a model for OpenVINO is proven: in float32 on the weights that it holds, then as it is shipped."""

from __future__ import annotations

from gemma_deploy.backends.base import Proof
from gemma_deploy.backends.openvino.gates import openvino_gates
from gemma_deploy.backends.openvino.model import require_openvino
from gemma_deploy.backends.openvino.source import SHIPPED, STRICT, OpenVinoSource
from gemma_deploy.names import OPENVINO_MODEL
from gemma_deploy.parity.compare import ParityResult, compare_sources, effect_of, judged, measures_of
from gemma_deploy.parity.sources import LogitSource
from gemma_deploy.parity.torch_sources import torch_sources


def prove_model(proof: Proof, result: ParityResult) -> None:
    """Compare and judge; see `Backend.prove`."""
    require_openvino("the proof of backend.type openvino")
    opened, manifest, cases = proof.checkpoint, proof.manifest, proof.cases
    models = torch_sources(opened, proof.artifact, manifest)
    file, size = proof.artifact / OPENVINO_MODEL, opened.config.hidden_size
    ours = (OpenVinoSource(file, kernels, hidden_size=size) for kernels in (STRICT, SHIPPED))
    all_sources: list[LogitSource] = [*models, *ours]
    sources = {source.name: source for source in all_sources}
    gates = openvino_gates(
        manifest.scheme, manifest.contract.cache_dtype, rounded=manifest.contract.input_group is not None
    )
    pairs = list(dict.fromkeys([*(gate.pair for gate in gates), (models[0].name, STRICT), (STRICT, SHIPPED)]))
    found = compare_sources(sources, pairs, cases, vocab_size=opened.config.vocab_size, report=proof.report)
    result.lines = judged(gates, found)
    result.measures = measures_of(found)
    result.effect = effect_of(found[models[0].name, SHIPPED], cases)
