"""How ONNX Runtime's graph is proven: exact on dequantized weights, then with the kernels it ships, then as a whole."""

from __future__ import annotations

from gemma_deploy.artifact.factors import linear_factors
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends.base import Proof
from gemma_deploy.backends.onnxruntime.adapters import Matrices, arrays_of, values_of
from gemma_deploy.backends.onnxruntime.bisect import dynamic_divergence, graph_divergence
from gemma_deploy.backends.onnxruntime.cache_proof import cache_lines
from gemma_deploy.backends.onnxruntime.gates import adapter_gates, dynamic_gates
from gemma_deploy.backends.onnxruntime.options import LAST
from gemma_deploy.backends.onnxruntime.source import (
    SHIPPED,
    STRICT,
    DynamicSource,
    bfloat16_line,
    line_of_14_bits,
    whole_graph_line,
)
from gemma_deploy.parity.bisect import Divergence
from gemma_deploy.parity.choices import note_of
from gemma_deploy.parity.compare import ParityResult, compare_sources, effect_of, judged, measures_of
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.parity.sources import LogitSource
from gemma_deploy.parity.torch_sources import adapted_sources, torch_sources


def prove_graph(proof: Proof, result: ParityResult) -> None:
    """Compare and judge; see `Backend.prove`."""
    artifact, opened, manifest, cases = proof.artifact, proof.checkpoint, proof.manifest, proof.cases
    on_cpu, logits = manifest.scheme != "bf16", manifest.contract.logits or LAST
    screened = manifest.kernels is not None and manifest.kernels.candidates > 0
    adapter = _matrices(proof)
    strict, shipped = (DynamicSource(artifact, kernels, adapter=adapter) for kernels in (STRICT, SHIPPED))
    models: tuple[TorchSource, ...]
    if proof.adapter is None:
        models = torch_sources(opened, artifact, manifest)
        gates = dynamic_gates(manifest.scheme, screened, int8_cache=manifest.int8_cache)
    else:
        models = adapted_sources(opened, artifact, manifest, directory=proof.adapter.directory)
        gates = adapter_gates(manifest.scheme, screened, int8_cache=manifest.int8_cache)
    reference = models[0].name
    sources: dict[str, LogitSource] = {source.name: source for source in (*models, strict)}
    pairs = list(dict.fromkeys([gate.pair for gate in gates] + [(reference, STRICT)]))
    if on_cpu:
        sources[shipped.name] = shipped
        pairs = list(dict.fromkeys([*pairs, (STRICT, SHIPPED)]))
    found = compare_sources(sources, pairs, cases, vocab_size=opened.config.vocab_size, report=proof.report)
    result.lines = judged(gates, found)
    if on_cpu:
        result.lines.append(
            whole_graph_line(artifact, shipped, cases[0], vocab_size=opened.config.vocab_size, logits=logits)
        )
    else:
        result.lines.append(bfloat16_line(artifact))
        result.notes.append(
            "computed in float32 on the bfloat16 weights: ONNX Runtime has no such kernels for a CPU, so those of a "
            "GPU provider were not run"
        )
    if manifest.int8_cache:
        result.lines += cache_lines(artifact, opened.config, [*cases[0].prompts[0], *cases[0].forced[0]])
    if manifest.kernels:
        result.lines.append(line_of_14_bits(artifact, manifest.kernels))
    result.measures = measures_of(found)
    if proof.adapter is None and models[-1] is not models[1]:
        result.notes += note_of(models[0], models[-1], cases)
    result.effect = effect_of(found[reference, SHIPPED if on_cpu else STRICT], cases)
    if not result.passed:
        proof.report("looking for the first layer that differs")
        divergence = _divergence(proof, models, adapter)
        result.divergence = divergence.to_json() if divergence else None


def _matrices(proof: Proof) -> Matrices | None:
    """What the graph takes of the adapter, from the file that its runtime loads."""
    if proof.adapter is None:
        return None
    return arrays_of(values_of(proof.adapter.kept, proof.manifest.contract.adapters))


def _divergence(proof: Proof, models: tuple[TorchSource, ...], adapter: Matrices | None) -> Divergence | None:
    """The first module of the graph that differs from the model with its weights."""
    artifact, case = proof.artifact, proof.cases[0]
    if adapter is None:
        hf, patched, same = models
        return dynamic_divergence(hf, patched, same, artifact=artifact, case=case)
    factors = linear_factors(ArtifactWeights(proof.checkpoint.config, artifact, proof.manifest))
    divided = {*factors.norms, *factors.rows}
    return graph_divergence(models[-1], artifact=artifact, case=case, adapter=adapter, divided=divided)
