"""The gate: hf = patched = artifact on real text and random tokens, prefill and every decode step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.job import Job
from gemma_deploy.parity.encoder import DISTANCE
from gemma_deploy.parity.gates import MERGE, STORED_WEIGHTS
from gemma_deploy.schemes import Scheme

if TYPE_CHECKING:
    from gemma_deploy.parity.compare import ParityResult


def run_gate(job: Job, out: Path, manifest: Manifest, *, report: Callable[[str], None]) -> ParityResult:
    """Prove the artifact in `out`, finished or not.

    Args:
        manifest: of the artifact, or what will become it; report: told what runs.
    """
    from gemma_deploy.proving import run_parity

    return run_parity(
        out,
        job.checkpoint,
        manifest=manifest,
        text=job.proof.text,
        prompt_tokens=job.proof.prompt_tokens,
        decode_tokens=job.proof.decode_tokens,
        report=report,
    )


def advice(scheme: Scheme, result: ParityResult) -> str:
    """What to do about a failed gate."""
    if any(line.name.startswith("headroom") and not line.passed for line in result.lines):
        return "this model's activations do not fit float16: use backend.dtype int8, bf16 or fp32"
    if any(line.comparison == STORED_WEIGHTS and not line.passed for line in result.lines):
        return "the file does not hold the checkpoint's weights: a bug in gemma-deploy, please report it with that page"
    if any(line.comparison == " = ".join(MERGE) and not line.passed for line in result.lines):
        return "the adapter was merged wrongly: a bug in gemma-deploy, please report it with that page"
    exact = [line for line in result.lines if line.name == "relative error"]
    if scheme.calibrated and exact and all(line.passed for line in exact):
        return (
            "the graphs are right, but rounding loses too much: calibrate on text like the one it will see (dataset), "
            "or ask for less (w8a16_gptq, a table in smaller groups, backend.dtype fp32)"
        )
    distant = any(line.name == DISTANCE and not line.passed for line in result.lines)
    if distant and exact and all(line.passed for line in exact):
        return "the graph is right, but rounding loses too much: ask for less (w8a16_gptq, backend.dtype fp16 or fp32)"
    if (
        scheme.codes
        and not scheme.calibrated
        and all(line.passed for line in result.lines if line.comparison != "weights")
    ):
        return "a matrix loses too much in its codes: use backend.dtype bf16, fp16 or fp32"
    return "the graphs do not compute what the checkpoint says: a bug in gemma-deploy, please report it with that page"
