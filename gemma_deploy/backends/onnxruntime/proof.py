"""How ONNX Runtime's graph is proven: exact on dequantized weights, then with the kernels it ships, then as a whole."""

from __future__ import annotations

from gemma_deploy.backends.base import Proof
from gemma_deploy.backends.onnxruntime.bisect import dynamic_divergence
from gemma_deploy.backends.onnxruntime.gates import dynamic_gates
from gemma_deploy.backends.onnxruntime.options import LAST
from gemma_deploy.backends.onnxruntime.source import DynamicSource, bfloat16_line, line_of_14_bits, whole_graph_line
from gemma_deploy.parity.compare import ParityResult, compare_sources, effect_of, judged, measures_of
from gemma_deploy.parity.sources import LogitSource
from gemma_deploy.parity.torch_sources import torch_sources


def prove_graph(proof: Proof, result: ParityResult) -> None:
    """Compare and judge; see `Backend.prove`."""
    artifact, opened, manifest, cases = proof.artifact, proof.checkpoint, proof.manifest, proof.cases
    scheme = manifest.scheme
    on_cpu, logits = scheme != "bf16", manifest.contract.logits or LAST
    strict, shipped = DynamicSource(artifact, "strict"), DynamicSource(artifact, "shipped")
    hf, patched, same_weights = torch_sources(opened, artifact, manifest)
    sources: dict[str, LogitSource] = {source.name: source for source in (hf, patched, same_weights, strict)}
    gates = dynamic_gates(scheme, manifest.kernels is not None and manifest.kernels.candidates > 0)
    pairs = list(dict.fromkeys([gate.pair for gate in gates] + [(hf.name, "strict")]))
    if on_cpu:
        sources[shipped.name] = shipped
        pairs += [("strict", "shipped")]
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
    if manifest.kernels:
        result.lines.append(line_of_14_bits(artifact, manifest.kernels))
    result.measures = measures_of(found)
    result.effect = effect_of(found[hf.name, "shipped" if on_cpu else "strict"], cases)
    if not result.passed:
        proof.report("looking for the first layer that differs")
        divergence = dynamic_divergence(hf, patched, same_weights, artifact=artifact, case=cases[0])
        result.divergence = divergence.to_json() if divergence else None
