"""The gate that `compile` runs and `parity` repeats: hf = patched = artifact, whatever back end made it."""

from __future__ import annotations

import logging
from pathlib import Path

from gemma_deploy import extras
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.backends import backend_of
from gemma_deploy.backends.base import BesideAdapter, Proof
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.parity.compare import ParityResult, Report, cases_for
from gemma_deploy.parity.gates import sqnr_line
from gemma_deploy.parity.weights import taken_over_line, weights_line
from gemma_deploy.progress import counted
from gemma_deploy.schemes import QUANTIZERS

log = logging.getLogger(__name__)


def run_parity(
    artifact: Path,
    checkpoint: str | Path | Checkpoint,
    *,
    manifest: Manifest,
    text: str | Path | None = None,
    prompt_tokens: int = 64,
    decode_tokens: int = 32,
    fast: bool = False,
    adapter: Path | None = None,
    report: Report = log.debug,
) -> ParityResult:
    """Prove an artifact against its checkpoint.

    Args:
        artifact: directory, finished or not; manifest: its manifest or what will become it.
        text: file to take the prompt from; the bundled C4 sample by default.
        prompt_tokens: at least this long; longer where the sliding window asks for it.
        fast: compare the optimized session as well; it holds the whole model, and no gate is on it.
        adapter: directory of a LoRA adapter that peft wrote: it is kept in the artifact, which computes with it beside
            its weights, and compared with PEFT's model of the checkpoint and the adapter.
        report: is told what runs.

    Raises:
        UsageError: the text file is missing or too short, or peft is, which adapters are compared with; the artifact
            takes no adapter; DeployError: a source could not run.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint, encoder=True)
    if opened.adapters or adapter is not None:
        extras.require("adapters", what=f"the proof of {'a merged' if adapter is None else 'an'} adapter")
    backend, beside = backend_of(manifest), None
    if opened.config.architecture.encoder:
        return _encoder(artifact, opened, manifest, text=text, prompt_tokens=prompt_tokens, report=report)
    if adapter is not None:
        beside = BesideAdapter(backend.keep_adapter(Artifact(artifact, manifest), adapter), adapter)
    result = ParityResult()
    if opened.config.drafting is not None:  # which is asked no text
        backend.prove(Proof(artifact, opened, manifest, (), fast, report), result)
        _compare_weights(artifact, opened, manifest, result=result, report=report)
        return result
    cases = cases_for(
        opened, manifest.contract, text, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, notes=result.notes
    )
    if beside is not None:
        result.notes.append(f"with the adapter {beside.kept.name} of rank {beside.kept.record.rank} beside the weights")
    backend.prove(Proof(artifact, opened, manifest, tuple(cases), fast, report, beside), result)
    if opened.adapters:
        from gemma_deploy.parity.merged import prove_merge

        report("comparing with PEFT's model, unmerged")
        prove_merge(opened, cases, result=result, report=report)
    _compare_weights(artifact, opened, manifest, result=result, report=report)
    return result


def _compare_weights(
    artifact: Path, opened: Checkpoint, manifest: Manifest, *, result: ParityResult, report: Report
) -> None:
    """What is stored, beside what the checkpoint holds."""
    report("comparing weights")
    stored = ArtifactWeights(opened.config, artifact, manifest)
    folded = manifest.scheme in QUANTIZERS
    tick = counted(report, "tensors")
    result.lines.append(weights_line(opened, stored, folded=folded, embed_scale=manifest.embed_scale, progress=tick))
    if taken := [row.name for row in manifest.params if row.scheme == "taken_over" and row.name.endswith(".weight")]:
        result.lines.append(taken_over_line(opened, stored, dict.fromkeys(taken)))
    measured = any(row.signal_energy is not None and ".layers." in row.name for row in manifest.params)
    if manifest.storage and manifest.storage.linears.bits == 8 and (measured or not taken):
        result.lines.append(sqnr_line(manifest.params))


def _encoder(
    artifact: Path,
    opened: Checkpoint,
    manifest: Manifest,
    *,
    text: str | Path | None,
    prompt_tokens: int,
    report: Report,
) -> ParityResult:
    """The proof of an encoder."""
    from gemma_deploy.parity.encoder import text_cases
    from gemma_deploy.proving.encoder import prove_encoder

    result = ParityResult()
    file = None if text is None else str(text)
    cases = text_cases(opened, manifest.contract.context, file, asked=prompt_tokens, notes=result.notes)
    prove_encoder(Proof(artifact, opened, manifest, tuple(cases), True, report), result)
    _compare_weights(artifact, opened, manifest, result=result, report=report)
    return result
