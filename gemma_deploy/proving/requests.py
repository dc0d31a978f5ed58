"""What `gemma-deploy parity` can be asked for: artifact or patched model against transformers, or two artifacts.

Finds the inputs, checks that they belong together, and leaves the comparing to compare.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_deploy.artifact.adapters import beside_of
from gemma_deploy.artifact.manifest import Manifest, ProofRecord
from gemma_deploy.artifact.opened import Artifact, newest_artifact
from gemma_deploy.artifact.origin import checkpoint_of
from gemma_deploy.artifact.pages import gate_values, rendered
from gemma_deploy.backends import backend_of
from gemma_deploy.checkpoint import AdapterRef, Checkpoint, resolve_checkpoint
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import UsageError
from gemma_deploy.parity.cases import GivenSizes
from gemma_deploy.parity.compare import ParityResult, cases_for, compare_sources, judged, measures_of
from gemma_deploy.parity.gates import Gate, relative
from gemma_deploy.proving.prove import run_parity

# Two artifacts of the same scheme compute the same numbers, of different ones nearly the same distribution.
SAME_SCHEME, OTHER_SCHEME = 1e-5, 0.01


@dataclass(frozen=True)
class Request:
    """The options that all comparisons share; None takes the artifact's recipe or the default."""

    text: Path | None = None
    prompt_tokens: int | None = None
    decode_tokens: int | None = None
    fast: bool = False
    report: Callable[[str], None] = lambda line: None
    adapters: tuple[AdapterRef, ...] = ()

    def lengths(self, parity: ProofRecord | None) -> tuple[int, int]:
        """Prompt and decode tokens, from here or from a recipe's `parity`."""
        prompt, decode = (parity.prompt_tokens, parity.decode_tokens) if parity else (64, 32)
        return self.prompt_tokens or prompt, decode if self.decode_tokens is None else self.decode_tokens


def find_artifact(artifact: Path | None, workspace: Path) -> Path:
    """The artifact asked for, or the newest of the workspace."""
    return artifact if artifact is not None else newest_artifact(workspace)


def artifact_stage(path: Path, checkpoint: str | None, request: Request) -> ParityResult:
    """Prove hf = patched = artifact.

    Raises:
        UsageError: the checkpoint is not the one the artifact was made from; DeployError: see run_parity.
    """
    artifact = Artifact.open(path)
    beside = beside_of(artifact, request.adapters)
    opened = checkpoint_of(artifact, checkpoint, () if beside else request.adapters)
    prompt, decode = request.lengths(artifact.manifest.recipe.parity)
    text = request.text or artifact.manifest.recipe.parity.text
    return run_parity(
        path,
        opened,
        manifest=artifact.manifest,
        text=text,
        prompt_tokens=prompt,
        decode_tokens=decode,
        fast=request.fast,
        adapter=beside,
        report=request.report,
    )


def patched_stage(checkpoint: str, request: Request) -> ParityResult:
    """Prove hf = patched in torch: config, tokenizer, base model and causal LM, float32 and bfloat16.

    No artifact is needed. The gates are what a port to another framework has to show (docs/design.md 6).
    """
    from gemma_deploy.parity import alignment
    from gemma_deploy.parity.reference import TorchSource

    opened = Checkpoint.open(resolve_checkpoint(checkpoint), request.adapters)
    result = ParityResult()
    prompt, decode = request.lengths(None)
    longest = opened.config.max_position_embeddings
    if decode >= longest:
        raise UsageError(
            f"{decode} decode steps leave no room for a prompt",
            where="--decode-tokens",
            expected=f"fewer than the model's {longest} positions",
            next_step="compare fewer decode steps",
        )
    sizes = GivenSizes(batch=1, prefill=longest - decode, context=longest)
    cases = cases_for(opened, sizes, request.text, prompt_tokens=prompt, decode_tokens=decode, notes=result.notes)
    sources = {kind: TorchSource(opened, kind) for kind in ("hf", "patched")}
    result.lines = [alignment.config_line(opened), *alignment.tokenizer_lines(opened, request.text, result.notes)]
    result.lines += alignment.model_lines(opened, sources, cases, report=request.report, measures=result.measures)
    if not result.passed:
        from gemma_deploy.parity.bisect import torch_divergence

        divergence = torch_divergence(sources["hf"], sources["patched"], cases[0], tolerance=1e-5)
        result.divergence = divergence.to_json() if divergence else None
    return result


def two_artifacts(path: Path, other: Path, checkpoint: str | None, *, request: Request) -> ParityResult:
    """Strict against strict: equal for one scheme, close in KL for two.

    Raises:
        UsageError: the two differ in batch, lengths or model.
    """
    test, reference = Artifact.open(path), Artifact.open(other)
    if beside_of(test, request.adapters):
        raise UsageError(
            "an adapter beside an artifact is compared with PEFT's own model",
            where="--adapter",
            next_step="leave --against out; `gemma-deploy eval ARTIFACT --adapter DIR --against OTHER` compares two",
        )
    differing = [
        f"{key}: {here} here, {there} there"
        for key in ("batch", "prefill", "context", "vocab_size")
        if (here := getattr(test.manifest.contract, key)) != (there := getattr(reference.manifest.contract, key))
    ]
    if differing:
        raise UsageError(
            "the two artifacts take different inputs",
            where=f"{path}, {other}",
            problems=differing,
            next_step="compile both with the same frontend.shape",
        )
    opened = checkpoint_of(test, checkpoint, request.adapters)
    result = ParityResult()
    prompt, decode = request.lengths(test.manifest.recipe.parity)
    cases = cases_for(
        opened, test.manifest.contract, request.text, prompt_tokens=prompt, decode_tokens=decode, notes=result.notes
    )
    sources = {"reference": open_engine(reference).source("strict"), "strict": open_engine(test).source("strict")}
    pair = ("reference", "strict")
    found = compare_sources(sources, [pair], cases, vocab_size=opened.config.vocab_size, report=request.report)
    forms = [(one.scheme, one.int8_cache, backend_of(one).rounds(one)) for one in (test.manifest, reference.manifest)]
    same = forms[0] == forms[1] and not forms[0][2]  # see gates_of: where something is rounded, nothing is repeated
    gates = relative(SAME_SCHEME, pair) if same else (Gate(pair, "kl_mean", OTHER_SCHEME, ("text",), pooled=True),)
    result.lines, result.measures = judged(gates, found), measures_of(found)
    return result


def refuse_runtime(asked: str, manifest: Manifest) -> None:
    """Refuse to run graphs on what this machine has no runtime of.

    Args:
        asked: `--backend`; manifest: of the artifact.

    Raises:
        UsageError: its graphs run on something else.
    """
    runtime = backend_of(manifest).runs_on
    if asked != runtime:
        raise UsageError(
            f"no runtime of {asked} is known here: graphs for {manifest.recipe.backend.type} run on {runtime}",
            where="--backend",
            next_step=f"leave --backend out, or give {runtime}: it computes what the graphs say",
        )


def page(title: str, result: ParityResult) -> str:
    """One self-contained HTML page."""
    said = {"title": title, "passed": result.passed, "notes": result.notes, "divergence": result.divergence}
    return rendered("parity.html.j2", **said, **gate_values(result, result.measures))
