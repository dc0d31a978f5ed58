"""Everything about a compile that can be refused before any work: told at once, by `compile` and `--dry-run` alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gemma_deploy import extras
from gemma_deploy.artifact.commit import ArtifactDir
from gemma_deploy.calibration.address import CLUSTER
from gemma_deploy.calibration.mix import HubPlace
from gemma_deploy.calibration.pipeline import Request, dataset_record, make_windows
from gemma_deploy.calibration.words import calibration_sentence
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.job import Job
from gemma_deploy.machine import give_memory_back
from gemma_deploy.parity.cases import GivenSizes
from gemma_deploy.parity.compare import cases_for
from gemma_deploy.reading import is_file
from gemma_deploy.recipe import Recipe
from gemma_deploy.stages.calibration import with_text
from gemma_deploy.stages.keys import StageKeys, stage_keys
from gemma_deploy.workdir import refuse_directory

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """A compile that nothing speaks against.

    Args:
        request: the calibration text, None where none is looked at; dataset: its record.
        keys: of the stages; work: where the artifact grows, not entered yet.
        is_up_to_date: there is nothing to do.
    """

    job: Job
    request: Request | None
    dataset: Mapping[str, Any] | None
    keys: StageKeys
    work: ArtifactDir
    is_up_to_date: bool

    @property
    def text(self) -> str | None:
        """On which text is calibrated, in a sentence."""
        return None if self.dataset is None else f"calibration text: {calibration_sentence(self.dataset)}"


def check(recipe: Recipe, out: Path | None, *, parity: bool, force: bool, thorough: bool = False) -> Checked:
    """Open everything and refuse what cannot be done.

    Args:
        out, parity, force: as in `compile_recipe`.
        thorough: look at the calibration text and the cluster as well, which a compile does in its first stage.

    Raises:
        DeployError: see `Job.open`; of what is refused after that, one error with all of it.
    """
    job, refusals = Job.open(recipe, out), _Refusals()
    refusals.collect(lambda: refuse_directory(job.out, "--out"))
    opened = refusals.collect(lambda: _with_keys(job))
    work = None
    if opened is not None:
        job, _, _, keys = opened
        work = refusals.collect(
            lambda: ArtifactDir(job.out, key=keys.artifact, wanted=keys.measured(gate=parity), force=force)
        )
    is_up_to_date = work is not None and bool(refusals.collect(work.is_up_to_date))
    if work is not None and not is_up_to_date:
        refusals.collect(work.refuse_strangers)
    if not is_up_to_date:
        refusals.collect(lambda: job.backend.require_tools(job.spec, proof=parity))
        if parity:
            if job.checkpoint.adapters:
                refusals.collect(lambda: extras.require("adapters", what="the proof of a merged adapter"))
            refusals.collect(lambda: _look_at_proof_text(job))
        if thorough:
            _look_closely(job, None if opened is None else opened[1], refusals)
    refusals.raise_all(job.name)
    assert opened is not None  # or there was a refusal
    assert work is not None
    return Checked(*opened, work, is_up_to_date)


def _with_keys(job: Job) -> tuple[Job, Request | None, Mapping[str, Any] | None, StageKeys]:
    """The job with its text, and the keys of its stages."""
    job, request = with_text(job)
    dataset = None if request is None else dataset_record(job.checkpoint, request)
    return job, request, dataset, stage_keys(job, dataset)


def _look_at_proof_text(job: Job) -> None:
    """The gate's text is long enough; that it is there is asked in preflight.py."""
    proof, spec = job.proof, job.spec
    if proof.text is not None and is_file(proof.text):
        sizes = GivenSizes(spec.batch, spec.prefill, spec.context)
        cases_for(
            job.checkpoint,
            sizes,
            proof.text,
            prompt_tokens=proof.prompt_tokens,
            decode_tokens=proof.decode_tokens,
            notes=[],
        )
        give_memory_back()  # of the tokenizer


def _look_closely(job: Job, request: Request | None, refusals: _Refusals) -> None:
    """Windows can be cut, where the text is on this machine, and a cluster answers."""
    if request is not None and not any(isinstance(part.place, HubPlace) for part in request.mix.parts):
        refusals.collect(lambda: make_windows(job.checkpoint, request))
        give_memory_back()  # of the tokenizer
    cluster = job.workers.cluster
    if cluster is not None and job.scheme.calibrates:
        refusals.collect(lambda: CLUSTER.require(cluster))


class _Refusals:
    """Errors, collected to be told together."""

    def __init__(self) -> None:
        self._errors: list[DeployError] = []

    def collect(self, step: Callable[[], T]) -> T | None:
        """What a step gives; None where it refuses."""
        try:
            return step()
        except DeployError as error:
            self._errors.append(error)
            return None

    def raise_all(self, name: str) -> None:
        """Raise what was collected: an error alone as it is, several as one."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            usage = all(isinstance(error, UsageError) for error in self._errors)
            raise (UsageError if usage else DeployError)(
                f"the job cannot be done as asked ({len(self._errors)} problems)",
                where=f"recipe {name}",
                problems=[str(error).replace("\n", "\n    ") for error in self._errors],
                next_step="correct all of them",
            )
