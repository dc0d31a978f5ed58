"""How the static pair is proven: its own graphs, cut apart and computed to the letter, a layer at a time."""

from __future__ import annotations

from gemma_deploy.backends.base import Proof
from gemma_deploy.backends.tvm_vacc.bisect import first_divergence
from gemma_deploy.backends.tvm_vacc.fast_source import FastSource
from gemma_deploy.backends.tvm_vacc.gates import gates_of
from gemma_deploy.backends.tvm_vacc.rounding import rounding_lines
from gemma_deploy.backends.tvm_vacc.segments import StrictSource
from gemma_deploy.parity.choices import note_of
from gemma_deploy.parity.compare import ParityResult, compare_sources, effect_of, judged, measures_of
from gemma_deploy.parity.gates import SAME_WEIGHTS, headroom_line
from gemma_deploy.parity.sources import LogitSource
from gemma_deploy.parity.torch_sources import torch_sources


def prove_pair(proof: Proof, result: ParityResult) -> None:
    """Compare and judge; see `Backend.prove`."""
    artifact, opened, manifest, cases = proof.artifact, proof.checkpoint, proof.manifest, proof.cases
    scheme = manifest.scheme
    strict = StrictSource(artifact, manifest)
    hf, patched, same_weights = torch_sources(opened, artifact, manifest)
    sources: dict[str, LogitSource] = {source.name: source for source in (hf, patched, same_weights, strict)}
    gates = gates_of(scheme, manifest.int8_cache)
    rounding = rounding_lines(artifact, manifest)
    repeating = StrictSource(artifact, manifest, rounding=False) if rounding else strict
    sources[repeating.name] = repeating
    pairs = list(dict.fromkeys([gate.pair for gate in gates] + [(SAME_WEIGHTS[scheme], repeating.name)]))
    if proof.fast:
        sources["fast"] = FastSource(artifact)
        pairs += [("strict", "fast"), (hf.name, "fast")]
    found = compare_sources(sources, pairs, cases, vocab_size=opened.config.vocab_size, report=proof.report)
    result.lines = [*rounding, *judged(gates, found)]
    if scheme == "fp16":
        result.lines.append(headroom_line(hf.absmax, strict.rescaling))
    result.measures = measures_of(found)
    if same_weights is not patched:
        result.notes += note_of(hf, same_weights, cases)
    result.effect = effect_of(found[hf.name, "strict"] if (hf.name, "strict") in found else found[pairs[-1]], cases)
    if not result.passed:
        proof.report("looking for the first layer that differs")
        divergence = first_divergence(hf, patched, same_weights, strict=repeating, cases=cases, scheme=scheme)
        result.divergence = divergence.to_json() if divergence else None
