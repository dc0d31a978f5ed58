"""What a compile learns from calibration text before it writes parameters: float16's exponents, quantized weights.

Imported by compile.py alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_deploy.calibration.address import require_cluster
from gemma_deploy.calibration.pipeline import Request, fit_to_sample, make_windows
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError, DeployError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.params.overlay import Overlay
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.reading import FileKind, read_object
from gemma_deploy.recipe import Recipe
from gemma_deploy.schemes import QUANTIZERS
from gemma_deploy.text import has_tokenizer
from gemma_deploy.writing import finite, write_json

QUANTIZED = "quantized"
RESULT = FileKind(DeployError, "what an earlier run wrote", "run the same command again")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantized:
    """The quantizer's result.

    Args:
        source: the checkpoint with what replaces its weights; settings: of the solver.
        layers, table: what came of each.
        window: the first of the calibration text, token ids.
        kept: linears whose inputs are not rounded, the others' are; None where none are.
    """

    source: Overlay
    settings: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]
    table: Mapping[str, Any]
    window: Sequence[int]
    kept: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        values = {"settings": dict(self.settings), "layers": list(self.layers), "table": dict(self.table)}
        return values if self.kept is None else values | {"activations": {"bits": 8, "kept": list(self.kept)}}


def windows_of(recipe: Recipe, checkpoint: Checkpoint) -> Request | None:
    """The text this compile looks at, or None when it looks at none.

    Raises:
        CheckpointError: a calibrated scheme needs a tokenizer.
    """
    dataset, scale = recipe.dataset, recipe.frontend.model_kwargs.embed_scale
    if (recipe.weights in QUANTIZERS or recipe.int8_cache) and not has_tokenizer(checkpoint):
        raise CheckpointError(
            f"has no tokenizer, but {recipe.scheme} calibrates on text",
            where=str(checkpoint.path),
            next_step="copy tokenizer.json there, or set frontend.quantize.type: w8a16, which looks at no data",
        )
    if recipe.weights in QUANTIZERS or (recipe.int8_cache and recipe.weights != "fp16"):
        given, longest = dataset.model_fields_set, checkpoint.config.max_position_embeddings
        seqlen = dataset.seqlen if "seqlen" in given else min(dataset.seqlen, longest)
        request = Request(dataset.name, dataset.path, dataset.nsamples, seqlen, embed_scale=scale)
        return request if "nsamples" in given else fit_to_sample(checkpoint, request)
    if recipe.weights == "fp16":
        from gemma_deploy.parity.maxima import windows_request

        return windows_request(
            checkpoint, dataset=dataset.name, path=dataset.path, context=recipe.context_length, embed_scale=scale
        )
    return None


def choose_rescaling(
    recipe: Recipe, checkpoint: Checkpoint, looked_at: Request | None, out: Path, key: str
) -> tuple[Rescaling, bool]:
    """Largest activations on calibration text, and the powers of two that bring them into float16.

    Returns:
        What was chosen, and whether a run before this one had done it.

    Raises:
        NotFiniteError: the weights are damaged.
    """
    done = out / "rescaling.json"
    if (record := _known(done, key)) is not None:
        return Rescaling.from_json(record), True
    from gemma_deploy.parity.maxima import measure_rescaling

    rescaling = measure_rescaling(
        checkpoint,
        looked_at,
        context=recipe.context_length,
        embed_scale=recipe.frontend.model_kwargs.embed_scale,
    )
    write_json(done, rescaling.to_json() | {"key": key})
    give_memory_back()
    return rescaling, False


def quantize_weights(
    recipe: Recipe, checkpoint: Checkpoint, looked_at: Request, out: Path, key: str, progress: Progress | None
) -> Quantized:
    """Step 7: every decoder layer quantized on what the layers before it give; resumable per layer."""
    from gemma_deploy.calibration.executors import open_executor
    from gemma_deploy.quantization.keeping import HEAVY_TAILED, KEEP, KEEP_WIDE, LEAST_NOISE, linears_to_keep
    from gemma_deploy.quantization.layers import quantize_layers
    from gemma_deploy.quantization.observing import scratch_of
    from gemma_deploy.quantization.results import layer_file, table_file
    from gemma_deploy.quantization.solver import Settings
    from gemma_deploy.quantization.table import scale_table

    quantizer, section = QUANTIZERS[recipe.weights], recipe.frontend.quantize
    assert section is not None  # the scheme comes from there
    storage = recipe.storage_for(checkpoint.config.hidden_size)
    given = section.calib_args
    defaults = Settings()
    settings = Settings(
        bits=storage.linears.bits,
        groupsize=storage.linears.groupsize,
        percdamp=defaults.percdamp if given.percdamp is None else given.percdamp,
        act_order=defaults.act_order if given.act_order is None else given.act_order,
        blocksize=given.blocksize,
        compensate=quantizer.compensate,
        activations=quantizer.activations,
        kept_w8=storage.kept_w8,
    )
    folder, workspace = out / QUANTIZED, recipe.workspace
    if workspace.cluster is not None:
        require_cluster(workspace.cluster)
    windows = make_windows(checkpoint, looked_at)
    give_memory_back()  # of the tokenizer
    with open_executor(scratch_of(folder), processes=workspace.processes, cluster=workspace.cluster) as executor:
        records = quantize_layers(
            checkpoint,
            windows.ids,
            settings,
            folder,
            key=key,
            true_sequential=given.true_sequential,
            int8_cache=recipe.int8_cache,
            embed_scale=looked_at.embed_scale,
            progress=progress,
            executor=executor,
        )
    table = scale_table(checkpoint, windows.ids.shape, folder, codes=storage.table, embed_scale=looked_at.embed_scale)
    files = [layer_file(folder, layer) for layer in range(checkpoint.config.num_hidden_layers)]
    kept = None
    if quantizer.activations:
        share, least, first = (KEEP_WIDE, 0.0, HEAVY_TAILED) if recipe.onnxruntime else (KEEP, LEAST_NOISE, None)
        share = share if given.keep_a16 is None else given.keep_a16
        kept = linears_to_keep(records, checkpoint.config, share, least, first)
    used = asdict(settings) | {"true_sequential": given.true_sequential}
    give_memory_back()
    source = Overlay(checkpoint, [*files, table_file(folder)], records)
    return Quantized(source, used, records, table, windows.ids[0].tolist(), kept)


def calibrate_cache(
    recipe: Recipe, checkpoint: Checkpoint, looked_at: Request, out: Path, key: str, progress: Progress | None
) -> tuple[Overlay, bool]:
    """Factors of an int8 cache where the weights are rounded to nearest: the checkpoint's own keys and values.

    Returns:
        The checkpoint with the factors beside its tensors, and whether a run before this one had made them.
    """
    from gemma_deploy.calibration.executors import open_executor
    from gemma_deploy.quantization.cache import observe_cache
    from gemma_deploy.quantization.observing import scratch_of
    from gemma_deploy.quantization.results import read_record

    folder, workspace = out / QUANTIZED, recipe.workspace
    file, mark = folder / "cache.safetensors", folder / "cache.json"
    done = _known(mark, key) is not None and read_record(file) is not None
    if not done:
        if workspace.cluster is not None:
            require_cluster(workspace.cluster)
        file.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(mark, {"key": key})
        windows = make_windows(checkpoint, looked_at)
        give_memory_back()  # of the tokenizer
        with open_executor(scratch_of(folder), processes=workspace.processes, cluster=workspace.cluster) as executor:
            observe_cache(
                checkpoint,
                windows.ids,
                file,
                embed_scale=looked_at.embed_scale,
                executor=executor,
                progress=progress,
            )
        give_memory_back()
    return Overlay(checkpoint, [file], []), done


def layer_sensitivity(
    checkpoint: Checkpoint,
    manifest: Mapping[str, Any],
    window: Sequence[int],
    out: Path,
    key: str,
    progress: Progress | None,
) -> tuple[dict[str, Any], bool]:
    """What the model loses when one layer alone is quantized, and whether a run before this one had measured it.

    Args:
        manifest: of the artifact in the making, whose parameters are written.
    """
    done = out / "sensitivity.json"
    if (record := _known(done, key)) is not None:
        return record, True
    from gemma_deploy.parity.sensitivity import measure_sensitivity
    from gemma_deploy.parity.stored import StoredWeights

    found = measure_sensitivity(
        checkpoint,
        StoredWeights(checkpoint, out, manifest),
        window,
        out / QUANTIZED,
        embed_scale=manifest["recipe"]["frontend"]["model_kwargs"]["embed_scale"],
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
