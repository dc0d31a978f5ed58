"""The gate that `compile` runs and `parity` repeats: hf = patched = artifact, whatever back end made it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.backends import backend_of
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.compare import (
    ParityResult,
    Report,
    cases_for,
    compare_sources,
    effect_of,
    judged,
    measures_of,
)
from gemma_deploy.parity.gates import TWINS, dynamic_gates, gates_of, headroom_line, sqnr_line
from gemma_deploy.parity.sources import FastSource, Source
from gemma_deploy.schemes import QUANTIZERS, Storage

if TYPE_CHECKING:
    from gemma_deploy.parity.reference import TorchSource

log = logging.getLogger(__name__)


def run_parity(
    artifact: Path,
    checkpoint: str | Path | Checkpoint,
    *,
    manifest: Mapping[str, Any],
    text: str | Path | None = None,
    prompt_tokens: int = 64,
    decode_tokens: int = 32,
    fast: bool = False,
    report: Report = log.debug,
) -> ParityResult:
    """Prove an artifact against its checkpoint.

    Args:
        artifact: directory, finished or not; manifest: its manifest or what will become it.
        text: file to take the prompt from; the bundled C4 sample by default.
        prompt_tokens: at least this long; longer where the sliding window asks for it.
        fast: compare the optimized session as well; it holds the whole model, and no gate is on it.
        report: is told what runs.

    Raises:
        UsageError: the text file is missing or too short; DeployError: a source could not run.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    result = ParityResult()
    cases = cases_for(opened, manifest["contract"], text, prompt_tokens, decode_tokens, result.notes)
    if backend_of(manifest) == "onnxruntime":
        _prove_dynamic(result, artifact, opened, manifest, cases, report)
    else:
        _prove_pair(result, artifact, opened, manifest, cases, fast, report)
    if manifest["storage"] and Storage.from_json(manifest["storage"]).linears.bits == 8:
        result.lines.append(sqnr_line(manifest["params"]))
    return result


def _prove_pair(
    result: ParityResult,
    artifact: Path,
    opened: Checkpoint,
    manifest: Mapping[str, Any],
    cases: Sequence[Case],
    fast: bool,
    report: Report,
) -> None:
    """The vendor's pair of graphs, layer by layer."""
    from gemma_deploy.parity.rounding import rounding_lines
    from gemma_deploy.parity.segments import StrictSource

    scheme = str(manifest["scheme"])
    strict = StrictSource(artifact, manifest)
    hf, patched, twin = torch_sources(opened, artifact, manifest)
    sources: dict[str, Source] = {source.name: source for source in (hf, patched, twin, strict)}
    gates = gates_of(scheme, bool(manifest.get("int8_cache")))
    rounding = rounding_lines(artifact, manifest)
    repeating = StrictSource(artifact, manifest, rounding=False) if rounding else strict
    sources[repeating.name] = repeating
    pairs = list(dict.fromkeys([gate.pair for gate in gates] + [(TWINS[scheme], repeating.name)]))
    if fast:
        sources["fast"] = FastSource(artifact)
        pairs += [("strict", "fast"), (hf.name, "fast")]
    found = compare_sources(sources, pairs, cases, opened.config.vocab_size, report)
    result.lines = [*rounding, *judged(gates, found)]
    if scheme == "fp16":
        result.lines.append(headroom_line(hf.absmax, strict.rescaling))
    result.measures = measures_of(found)
    result.effect = effect_of(found[hf.name, "strict"] if (hf.name, "strict") in found else found[pairs[-1]], cases)
    if not result.passed:
        from gemma_deploy.parity.bisect import first_divergence

        report("looking for the first layer that differs")
        divergence = first_divergence(hf, patched, twin, repeating, cases, scheme)
        result.divergence = divergence.to_json() if divergence else None


def _prove_dynamic(
    result: ParityResult,
    artifact: Path,
    opened: Checkpoint,
    manifest: Mapping[str, Any],
    cases: Sequence[Case],
    report: Report,
) -> None:
    """ONNX Runtime's graph: exact on dequantized weights, then with the kernels it ships, then as a whole."""
    from gemma_deploy.parity.dynamic import DynamicSource, half_line, whole_graph_line, wide_line

    scheme = str(manifest["scheme"])
    on_cpu = scheme != "bf16"
    strict, shipped = DynamicSource(artifact, "strict"), DynamicSource(artifact, "shipped")
    hf, patched, twin = torch_sources(opened, artifact, manifest)
    sources: dict[str, Source] = {source.name: source for source in (hf, patched, twin, strict)}
    gates = dynamic_gates(scheme, bool((manifest.get("kernels") or {}).get("candidates")))
    pairs = list(dict.fromkeys([gate.pair for gate in gates] + [(hf.name, "strict")]))
    if on_cpu:
        sources[shipped.name] = shipped
        pairs += [("strict", "shipped")]
    found = compare_sources(sources, pairs, cases, opened.config.vocab_size, report)
    result.lines = judged(gates, found)
    if on_cpu:
        result.lines.append(whole_graph_line(artifact, shipped, cases[0]))
    else:
        result.lines.append(half_line(artifact))
        result.notes.append(
            "computed in float32 on the bfloat16 weights: ONNX Runtime has no such kernels for a CPU, so those of a "
            "GPU provider were not run"
        )
    if manifest.get("kernels"):
        result.lines.append(wide_line(artifact, manifest["kernels"]))
    result.measures = measures_of(found)
    result.effect = effect_of(found[hf.name, "shipped" if on_cpu else "strict"], cases)
    if not result.passed:
        from gemma_deploy.parity.bisect import dynamic_divergence

        report("looking for the first layer that differs")
        divergence = dynamic_divergence(hf, patched, twin, artifact, cases[0])
        result.divergence = divergence.to_json() if divergence else None


def torch_sources(
    opened: Checkpoint, artifact: Path, manifest: Mapping[str, Any]
) -> tuple[TorchSource, TorchSource, TorchSource]:
    """hf, patched, and the twin: the patched model with the artifact's own weights, where those are codes."""
    from gemma_deploy.parity.reference import TorchSource
    from gemma_deploy.parity.stored import StoredWeights

    scheme, scale = str(manifest["scheme"]), manifest["recipe"]["frontend"]["model_kwargs"]["embed_scale"]
    hf = TorchSource(opened, "hf", "bf16" if scheme == "bf16" else "fp32", scale)
    patched = TorchSource(opened, "patched", "bf16" if scheme == "bf16" else "fp32", scale)
    twin = patched
    if scheme == "w8a16" and Storage.from_json(manifest["storage"]) == Storage():
        twin = TorchSource(opened, "patched", "w8a16", scale)
    elif scheme == "w8a16" or scheme in QUANTIZERS:
        twin = TorchSource(StoredWeights(opened, artifact, manifest), "patched", "fp32", scale, name=TWINS[scheme])
    return hf, patched, twin
