"""The compiler: one recipe and one checkpoint become one verified artifact. Read `compile_recipe` top to bottom.

Stages write into NAME.partial and are skipped when what they would read is what it was; the directory is renamed only
when the gate has passed, so nothing that looks finished was ever left unfinished or unproven. Of a finished artifact
that lacks a measurement alone, that is made and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.manifest import GateRecord, Manifest
from gemma_deploy.artifact.report import REPORT, write_report
from gemma_deploy.calibration.pipeline import Request
from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.errors import GateError
from gemma_deploy.job import Job
from gemma_deploy.preflight import ResourcePlan, make_plan, preflight
from gemma_deploy.progress import BYTES, Report, Watcher
from gemma_deploy.recipe import Recipe
from gemma_deploy.stages.calibration import (
    calibrate_cache,
    choose_rescaling,
    layer_sensitivity,
    quantize_weights,
)
from gemma_deploy.stages.check import check
from gemma_deploy.stages.clock import StageClock, StageTiming
from gemma_deploy.stages.files import convert_tokenizer, write_model_files
from gemma_deploy.stages.gate import advice, run_gate
from gemma_deploy.stages.graphs import Graphs
from gemma_deploy.stages.keys import StageKeys
from gemma_deploy.stages.parameters import places_of, write_parameters
from gemma_deploy.stages.record import describe

if TYPE_CHECKING:
    from gemma_deploy.parity.compare import ParityResult


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileResult:
    """Where the artifact is, and what was measured on the way.

    Args:
        reused: the artifact was there already and nothing it depends on has changed.
        parity: the gate's result, None when parity was not asked for.
    """

    path: Path
    stages: tuple[StageTiming, ...]
    reused: bool
    parity: GateRecord | None


def plan_recipe(recipe: Recipe, *, out: Path | None = None, parity: bool = True, force: bool = False) -> ResourcePlan:
    """What `--dry-run` shows: every stage that would run with its estimates, shortfalls included.

    Raises:
        DeployError: whatever `compile_recipe` would refuse before its first stage, or at the beginning of it.
    """
    checked = check(recipe, out, parity=parity, force=force, thorough=True)
    plan = make_plan(checked.job, parity=parity, built=checked.work.known is not None, request=checked.request)
    if checked.is_up_to_date:
        return replace(plan, is_up_to_date=True, stages=(), shortfalls=())
    return replace(plan, notes=(*plan.notes, *([checked.text] if checked.text else [])))


def compile_recipe(
    recipe: Recipe,
    *,
    out: Path | None = None,
    force: bool = False,
    parity: bool = True,
    on_stage: Callable[[StageTiming], None] | None = None,
    on_gate: Callable[[ParityResult], None] | None = None,
    watcher: Watcher | None = None,
) -> CompileResult:
    """Compile a recipe.

    Args:
        out: the artifact's directory (`workspace.path`/NAME by default).
        force: replace an artifact made from other inputs.
        parity: run the gate; without it the manifest says that nothing was proven.
        on_stage: called when a stage ends, well or not; on_gate: called with the gate's result, passed or not, when it
            ran; watcher: told when a stage begins and how far it is.

    Raises:
        DeployError: see errors.py; GateError when the numbers are wrong.
    """
    clock = StageClock(on_stage, watcher)
    with clock.stage("check"):
        checked = check(recipe, out, parity=parity, force=force)
        job, request, dataset, keys = checked.job, checked.request, checked.dataset, checked.keys
        room = (
            not checked.is_up_to_date
            and preflight(job, parity=parity, built=checked.work.known is not None, request=request).has_room_beside
        )
    if checked.text and not checked.is_up_to_date:
        log.info("%s", checked.text)
    with checked.work as artifact:
        if artifact.finished:
            return CompileResult(job.out, tuple(clock.done), True, artifact.manifest.parity)
        if artifact.known is None:
            manifest, files = _build(job, request, dataset, keys, artifact.path, clock, room)
        else:
            manifest = artifact.known.but(recipe=job.record)
            files = set(manifest.files)
        if keys.sensitivity and request and manifest.keys.get("sensitivity") != keys.sensitivity:
            with clock.stage("sensitivity") as stage:
                tick = clock.ticks("sensitivity", "layers", of=job.config.num_hidden_layers)
                found, stage.skipped = layer_sensitivity(
                    job, request, manifest, out=artifact.path, key=keys.sensitivity, progress=tick
                )
            manifest = manifest.measured("sensitivity", keys.sensitivity, sensitivity=found)
        result = None
        if parity and manifest.keys.get("gate") != keys.gate:
            with clock.stage("parity"):
                result = run_gate(job, artifact.path, manifest, report=Report(clock.watcher, "parity"))
            if on_gate is not None:
                on_gate(result)
            manifest = manifest.measured("gate", keys.gate, parity=result.to_json())
            manifest = manifest.but(ledger=job.backend.ledger(manifest))
        manifest = manifest.but(stages=clock.with_those_before(manifest.stages))
        write_report(artifact.path, manifest)
        if result is not None and not result.passed and job.proof.gate:
            raise GateError(
                "the artifact does not compute the model",
                where=str(artifact.path),
                problems=result.failures(),
                next_step=f"read {artifact.path / REPORT}; " + advice(job.scheme, result),
            )
        artifact.commit(manifest, files | {REPORT})
    return CompileResult(job.out, tuple(clock.done), False, manifest.parity)


def _build(
    job: Job,
    request: Request | None,
    dataset: Mapping[str, Any] | None,
    keys: StageKeys,
    out: Path,
    clock: StageClock,
    room: bool,
) -> tuple[Manifest, set[str]]:
    """Everything an artifact holds but what is measured about it.

    Args:
        request: the calibration text, `dataset` its record; room: for the export beside the parameters.

    Returns:
        The manifest so far, and every file by its path in `out`.
    """
    rescaling = quantized = None
    source: WeightSource = job.checkpoint
    if keys.ranges:
        with clock.stage("ranges") as stage:
            tick = clock.ticks("ranges", "layers")
            rescaling, stage.skipped = choose_rescaling(job, request, out, key=keys.ranges, progress=tick)
    if keys.quantize and request is not None:
        with clock.stage("quantize"):
            tick = clock.ticks("quantize", "layers", of=job.config.num_hidden_layers)
            quantized = quantize_weights(job, request, out, key=keys.quantize, progress=tick)
            source = quantized.source
    if keys.cache and request is not None:
        with clock.stage("cache") as stage:
            tick = clock.ticks("cache", "layers", of=job.config.num_hidden_layers)
            source, stage.skipped = calibrate_cache(job, request, out, key=keys.cache, progress=tick)
    unrounded = quantized.unrounded if quantized else None
    places = places_of(job, source, rescaling)
    with Graphs(job, out, places, rescaling=rescaling, unrounded=unrounded, beside=room) as graphs:
        with clock.stage("parameters") as stage:
            table = write_parameters(job, source, out, rescaling=rescaling, progress=clock.ticks("parameters", BYTES))
            stage.bytes = sum(file.file_bytes for file in table.files.values())
        with clock.stage("graphs") as stage:
            peak = graphs.write()
            stage.child_rss_bytes, stage.skipped, stage.beside = peak or 0, peak is None, graphs.is_beside
            stage.bytes = sum((out / file).stat().st_size for file in job.exported_files)
    with clock.stage("files") as stage:
        beside = write_model_files(job, out, places)
        converted, stage.child_rss_bytes = convert_tokenizer(job, out)
    manifest = describe(job, out, keys=keys, dataset=dataset, table=table, rescaling=rescaling, quantized=quantized)
    return manifest, {*table.files, *job.exported_files, *beside, *converted}
