"""What a compile learns from calibration text before it writes parameters: float16's exponents, quantized weights.

Each stage takes the job, the text and its key (provenance.py), and says whether a run before this one had done it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.calibration.address import CLUSTER
from gemma_deploy.calibration.pipeline import Request, fit_to_sample, make_windows
from gemma_deploy.errors import CheckpointError, DeployError
from gemma_deploy.job import Job
from gemma_deploy.machine import give_memory_back
from gemma_deploy.params.quantized import QuantizedCheckpoint
from gemma_deploy.progress import Tick
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.reading import FileKind, read_object
from gemma_deploy.text import has_tokenizer
from gemma_deploy.writing import finite, write_json

if TYPE_CHECKING:
    from gemma_deploy.quantization.solver import Settings

QUANTIZED = "quantized"
RESULT = FileKind(DeployError, "what an earlier run wrote", "run the same command again")


@dataclass(frozen=True)
class Quantized:
    """The quantizer's result.

    Args:
        source: the checkpoint with what replaces its weights; settings: of the solver.
        layers, table: what came of each.
        unrounded: linears whose inputs are not rounded, the others' are; None where none are.
    """

    source: QuantizedCheckpoint
    settings: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]
    table: Mapping[str, Any]
    unrounded: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        values = {"settings": dict(self.settings), "layers": list(self.layers), "table": dict(self.table)}
        return values if self.unrounded is None else values | {"activations": {"bits": 8, "kept": list(self.unrounded)}}


def calibration_request(job: Job) -> Request | None:
    """The text this compile looks at, or None when it looks at none.

    Raises:
        CheckpointError: a calibrated scheme needs a tokenizer.
    """
    checkpoint, dataset, scheme, scale = job.checkpoint, job.dataset, job.scheme, job.spec.embed_scale
    if scheme.calibrates and not has_tokenizer(checkpoint):
        raise CheckpointError(
            f"has no tokenizer, but {scheme} calibrates on text",
            where=str(checkpoint.path),
            next_step="copy tokenizer.json there, or set frontend.quantize.type: w8a16, which looks at no data",
        )
    if scheme.calibrated or (scheme.int8_cache and not job.rescales):
        longest = checkpoint.config.max_position_embeddings
        seqlen = dataset.seqlen if dataset.seqlen_given else min(dataset.seqlen, longest)
        request = Request(dataset.name, dataset.path, dataset.nsamples, seqlen, embed_scale=scale)
        return request if dataset.nsamples_given else fit_to_sample(checkpoint, request)
    if job.rescales:
        from gemma_deploy.parity.maxima import windows_request

        return windows_request(
            checkpoint, dataset=dataset.name, path=dataset.path, context=job.spec.context, embed_scale=scale
        )
    return None


def with_text(job: Job) -> tuple[Job, Request | None]:
    """The job and its text; where windows pass through the quantizer, it names as many of them as there are.

    Raises:
        See `calibration_request`.
    """
    request = calibration_request(job)
    if request is None or job.rescales:  # float16 looks at a few of them
        return job, request
    return job.with_windows(request.nsamples, request.seqlen), request


def choose_rescaling(
    job: Job, request: Request | None, out: Path, *, key: str, progress: Tick | None = None
) -> tuple[Rescaling, bool]:
    """Largest activations on calibration text, and the powers of two that bring them into float16.

    Returns:
        What was chosen, and whether a run before this one had done it.

    Raises:
        ParamsError: weights that are NaN or infinite; NotFiniteError: finite ones that give such activations.
    """
    done = out / "rescaling.json"
    if (record := _known(done, key)) is not None:
        return Rescaling.from_json(record), True
    from gemma_deploy.params.plan import build_plan
    from gemma_deploy.params.writer import refuse_bad_tensors
    from gemma_deploy.parity.maxima import NotFiniteError, measure_rescaling

    context, checkpoint = job.spec.context, job.checkpoint
    try:
        rescaling = measure_rescaling(
            checkpoint, request, context=context, embed_scale=job.spec.embed_scale, progress=progress
        )
    except NotFiniteError:
        refuse_bad_tensors(checkpoint, build_plan(checkpoint.config, "fp32", context))  # names tensor and row
        raise
    write_json(done, rescaling.to_json() | {"key": key})
    give_memory_back()
    return rescaling, False


def quantize_weights(job: Job, request: Request, out: Path, *, key: str, progress: Tick | None) -> Quantized:
    """Every decoder layer quantized on what the layers before it give; resumable per layer."""
    from gemma_deploy.calibration.executors import open_executor
    from gemma_deploy.quantization.layers import quantize_layers
    from gemma_deploy.quantization.mixed_precision import unrounded_inputs
    from gemma_deploy.quantization.moments_pass import scratch_of
    from gemma_deploy.quantization.results import layer_file, table_file
    from gemma_deploy.quantization.table import scale_table

    checkpoint, choices, workers = job.checkpoint, job.quantizer, job.workers
    settings, folder = solver_settings(job), out / QUANTIZED
    if workers.cluster is not None:
        CLUSTER.require(workers.cluster)
    windows = make_windows(checkpoint, request)
    give_memory_back()  # of the tokenizer
    with open_executor(scratch_of(folder), processes=workers.processes, cluster=workers.cluster) as executor:
        records = quantize_layers(
            checkpoint,
            windows.ids,
            settings,
            folder=folder,
            key=key,
            true_sequential=choices.true_sequential,
            int8_cache=job.scheme.int8_cache,
            embed_scale=request.embed_scale,
            progress=progress,
            executor=executor,
        )
    codes = None if checkpoint.config.architecture.encoder else job.storage.table  # no head reads the table
    table = scale_table(checkpoint, windows.ids.shape, folder, codes=codes, embed_scale=request.embed_scale)
    files = [layer_file(folder, layer) for layer in range(checkpoint.config.num_hidden_layers)]
    unrounded = None
    if job.scheme.rounds_activations:
        budget = job.backend.unrounded_inputs
        unrounded = unrounded_inputs(records, checkpoint.config, budget.with_share(choices.keep_a16))
    used = asdict(settings) | {"true_sequential": choices.true_sequential}
    give_memory_back()
    source = QuantizedCheckpoint(checkpoint, [*files, table_file(folder)], records)
    return Quantized(source, used, records, table, unrounded)


def solver_settings(job: Job) -> Settings:
    """What the solver is told: the scheme's, the recipe's, and its own defaults."""
    from gemma_deploy.quantization.solver import Settings

    quantizer, choices, storage, defaults = job.scheme.quantizer, job.quantizer, job.storage, Settings()
    assert quantizer is not None  # of a calibrated scheme
    return Settings(
        bits=storage.linears.bits,
        groupsize=storage.linears.groupsize,
        percdamp=defaults.percdamp if choices.percdamp is None else choices.percdamp,
        act_order=defaults.act_order if choices.act_order is None else choices.act_order,
        blocksize=choices.blocksize,
        compensate=quantizer.compensate,
        activations=quantizer.activations,
        kept_w8=storage.kept_w8,
        scales=storage.linears.scales,
    )


def calibrate_cache(
    job: Job, request: Request, out: Path, *, key: str, progress: Tick | None
) -> tuple[QuantizedCheckpoint, bool]:
    """Factors of an int8 cache where the weights are rounded to nearest: the checkpoint's own keys and values.

    Returns:
        The checkpoint with the factors beside its tensors, and whether a run before this one had made them.
    """
    from gemma_deploy.calibration.executors import open_executor
    from gemma_deploy.quantization.cache import observe_cache
    from gemma_deploy.quantization.moments_pass import scratch_of
    from gemma_deploy.quantization.results import read_record

    checkpoint, folder, workers = job.checkpoint, out / QUANTIZED, job.workers
    file, mark = folder / "cache.safetensors", folder / "cache.json"
    done = _known(mark, key) is not None and read_record(file) is not None
    if not done:
        if workers.cluster is not None:
            CLUSTER.require(workers.cluster)
        file.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(mark, {"key": key})
        windows = make_windows(checkpoint, request)
        give_memory_back()  # of the tokenizer
        with open_executor(scratch_of(folder), processes=workers.processes, cluster=workers.cluster) as executor:
            observe_cache(
                checkpoint,
                windows.ids,
                file,
                embed_scale=request.embed_scale,
                executor=executor,
                progress=progress,
            )
        give_memory_back()
    return QuantizedCheckpoint(checkpoint, [file], []), done


def layer_sensitivity(
    job: Job,
    request: Request,
    manifest: Manifest,
    *,
    out: Path,
    key: str,
    progress: Tick | None,
) -> tuple[dict[str, Any], bool]:
    """What the model loses when one layer alone is quantized, and whether a run before this one had measured it.

    Args:
        manifest: of the artifact in the making, whose parameters are written.
    """
    done = out / "sensitivity.json"
    if (record := _known(done, key)) is not None:
        return record, True
    from gemma_deploy.artifact.weights import ArtifactWeights
    from gemma_deploy.parity.sensitivity import measure_sensitivity

    window = make_windows(job.checkpoint, request).ids[0].tolist()
    give_memory_back()  # of the tokenizer
    found = measure_sensitivity(
        job.checkpoint,
        ArtifactWeights(job.config, out, manifest),
        window,
        scratch=out / QUANTIZED,
        embed_scale=manifest.embed_scale,
        progress=progress,
    )
    write_json(done, finite(found) | {"key": key})
    give_memory_back()
    return found, False


def _known(file: Path, key: str) -> dict[str, Any] | None:
    """What an earlier run of this key wrote, without the key; None where there is nothing, or not all of it."""
    try:
        record = read_object(file, RESULT)
    except DeployError:
        return None
    return record if record.pop("key", None) == key else None
