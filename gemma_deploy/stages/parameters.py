"""Every tensor read, cast or quantized, written and hashed in row blocks; resumable per tensor."""

from __future__ import annotations

from pathlib import Path

from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.job import Job
from gemma_deploy.params import ParamRow, ParamSpec, ParamTable, build_plan, write_params
from gemma_deploy.params.layout import Place, places
from gemma_deploy.params.naming import file_name
from gemma_deploy.params.quantized import QuantizedCheckpoint
from gemma_deploy.params.rescaled import RescaledCheckpoint
from gemma_deploy.params.taken_over import TakenOver
from gemma_deploy.progress import Tick
from gemma_deploy.quantization.rescaling import Rescaling


def plans_of(job: Job, source: WeightSource, rescaling: Rescaling | None = None) -> list[tuple[ParamSpec, ...]]:
    """What the parameter file of each part holds.

    Args:
        source: weights; those that are quantized already are copied as they are.
        rescaling: of float16; the plan's constants take it into account.
    """
    made = source.output_errors if isinstance(source, QuantizedCheckpoint) else None
    return [
        build_plan(
            job.config,
            job.scheme.form,
            job.spec.context,
            rescaling=rescaling,
            part=part,
            quantized=made,
            storage=job.storage,
            int8_cache=job.scheme.int8_cache,
            form=job.code_form,
            factors=job.spec.adapter_rank is not None,
            taken=job.taken_over,
        )
        for part in job.parts
    ]


def places_of(job: Job, source: WeightSource, rescaling: Rescaling | None = None) -> dict[str, tuple[Place, ...]]:
    """Where every tensor of each parameter file will lie, in the order of the file."""
    plans, naming = plans_of(job, source, rescaling), job.code_form.naming
    return {
        part.file(file_name(naming)): tuple(
            sorted(places(plan, naming, front=job.front), key=lambda place: place.offset)
        )
        for part, plan in zip(job.parts, plans, strict=True)
    }


def write_parameters(
    job: Job,
    source: WeightSource,
    out: Path,
    *,
    rescaling: Rescaling | None = None,
    progress: Tick | None = None,
) -> ParamTable:
    """Write the parameter files and return the table of all of them.

    Args:
        source: the weights, before `rescaling` is applied to them.
        out: the artifact's directory; progress: called with (bytes written, bytes in all).

    Raises:
        ParamsError: see `write_params`.
    """
    plans = plans_of(job, source, rescaling)
    total = sum(spec.nbytes for plan in plans for spec in plan)
    source = source if rescaling is None else RescaledCheckpoint(source, rescaling)
    if job.taken_over:
        source = TakenOver(source, job.checkpoint.quantized, job.taken_over)
    rows: list[ParamRow] = []
    name = file_name(job.code_form.naming)
    for part, plan in zip(job.parts, plans, strict=True):
        before = sum(row.nbytes for row in rows)
        table = write_params(
            source,
            plan,
            out / part.file(name),
            journal=out / part.file("params.journal"),
            naming=job.code_form.naming,
            front=job.front,
            workers=job.workers.writers,
            progress=None if progress is None else shifted(progress, before, total),
        )
        rows += table.moved(part.file(name)).rows
    return ParamTable(tuple(rows))


def shifted(progress: Tick, before: int, total: int) -> Tick:
    """Tick of one parameter file as that of all of them."""
    return lambda done, _: progress(min(before + done, total), total)
