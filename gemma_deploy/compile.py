"""The compiler: one recipe and one checkpoint become one verified artifact. Read `compile_recipe` top to bottom.

Stages write into NAME.partial and are skipped when what they would read is what it was; the directory is renamed only
when the gate has passed, so nothing that looks finished was ever left unfinished or unproven.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemma_deploy import paths
from gemma_deploy.artifact import ArtifactDir, op_census, write_report
from gemma_deploy.artifact.manifest import FORMAT_VERSION, tool_versions
from gemma_deploy.backends import backend
from gemma_deploy.backends.base import PARAMS, Backend, ExportJob
from gemma_deploy.backends.onnxruntime.window import WINDOW, window_problems
from gemma_deploy.calibrated import (
    calibrate_cache,
    choose_rescaling,
    layer_sensitivity,
    quantize_weights,
    windows_of,
)
from gemma_deploy.calibration.pipeline import dataset_record
from gemma_deploy.checkpoint import Checkpoint, resolve_checkpoint
from gemma_deploy.errors import CheckpointError, GateError
from gemma_deploy.graph.contract import GraphContract, Scheme
from gemma_deploy.machine import give_memory_back
from gemma_deploy.params import ParamRow, ParamTable, build_plan, write_params
from gemma_deploy.params.overlay import Overlay
from gemma_deploy.parity.gates import STORED_WEIGHTS
from gemma_deploy.partition import Part, division_problems, parts_of
from gemma_deploy.partition.ranks import input_channels, repeated_heads
from gemma_deploy.preflight import Plan, make_plan, preflight
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.recipe import Recipe, check_against_model, check_built
from gemma_deploy.schemes import QUANTIZERS, block_problems, group_problems, stored_scheme
from gemma_deploy.stages import Stage, Stages
from gemma_deploy.text import check_text, with_stops
from gemma_deploy.text.saving import write_tokenizer
from gemma_deploy.workdir import refuse_directory

if TYPE_CHECKING:
    from gemma_deploy.parity import ParityResult

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CompileResult:
    """Where the artifact is, and what was measured on the way.

    Args:
        reused: the artifact was there already and nothing it depends on has changed.
        parity: the gate's result as JSON, None when parity was not asked for.
    """

    path: Path
    stages: tuple[Stage, ...]
    reused: bool
    parity: dict[str, Any] | None


def open_inputs(recipe: Recipe) -> Checkpoint:
    """Steps 1 and 2: everything about recipe and checkpoint that can be wrong is found here, before any work.

    Raises:
        CheckpointError: the checkpoint or its tokenizer is damaged.
        RecipeError, NotBuiltError: it does not go with the recipe.
    """
    check_built(recipe)
    checkpoint = Checkpoint.open(resolve_checkpoint(recipe.frontend.checkpoint))
    align = recipe.frontend.model_kwargs.align_qkv
    config = checkpoint.config
    also = division_problems(config, recipe.split_points, recipe.ranks, align)
    if recipe.int8_weights:
        storage = recipe.storage_for(config.hidden_size)
        if recipe.onnxruntime:
            also += block_problems(input_channels(config, 1))
        also += group_problems(storage, input_channels(config, recipe.ranks), config.hidden_size)
    if recipe.onnxruntime and recipe.cache == WINDOW:
        also += window_problems(config, recipe.context_length)
    check_against_model(recipe, config, also)
    text = check_text(checkpoint)
    give_memory_back()  # of the tokenizer
    for note in dict.fromkeys((*checkpoint.notes, *checkpoint.config.warnings, *text.notes)):
        log.warning("%s", note)
    if repeated := repeated_heads(config, recipe.ranks):
        log.info("%s", repeated)
    return with_stops(checkpoint, text)


def plan_recipe(recipe: Recipe, *, parity: bool = True) -> Plan:
    """What `--dry-run` shows: every stage with its estimates, shortfalls included."""
    return make_plan(recipe, open_inputs(recipe), parity=parity)


def compile_recipe(
    recipe: Recipe,
    *,
    out: Path | None = None,
    force: bool = False,
    parity: bool = True,
    on_stage: Callable[[Stage], None] | None = None,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile a recipe.

    Args:
        out: the artifact's directory (`workspace.path`/NAME by default).
        force: replace an artifact made from other inputs.
        parity: run the gate; without it the manifest says that nothing was proven.
        on_stage: called when a stage ends; progress: called with (bytes written, bytes in all).

    Raises:
        DeployError: see errors.py; GateError when the numbers are wrong.
    """
    stages = Stages(on_stage)
    out = out or Path(recipe.workspace.path) / recipe.name
    refuse_directory(out, "--out")
    with stages.stage("check"):
        checkpoint = open_inputs(recipe)
        preflight(recipe, checkpoint, out=out, parity=parity)
        looked_at = windows_of(recipe, checkpoint)
        dataset = None if looked_at is None else dataset_record(checkpoint, looked_at)
        key = input_key(recipe, checkpoint, dataset)
    with ArtifactDir(out, key=key, force=force, proven=parity) as artifact:
        if artifact.finished:
            return CompileResult(out, tuple(stages.done), True, artifact.manifest["parity"])
        contract, rescaling, quantized = backend_for(recipe).contract(recipe, checkpoint.config), None, None
        if recipe.weights == "fp16":
            with stages.stage("ranges") as stage:
                try:
                    rescaling, stage.skipped = choose_rescaling(recipe, checkpoint, looked_at, artifact.path, key)
                except CheckpointError:
                    stream_params(recipe, checkpoint, artifact.path)  # stops at a damaged tensor and names its row
                    raise
        if recipe.weights in QUANTIZERS and looked_at is not None:
            with stages.stage("quantize"):
                quantized = quantize_weights(recipe, checkpoint, looked_at, artifact.path, key, progress)
        source: Checkpoint | Overlay = quantized.source if quantized else checkpoint
        if recipe.int8_cache and quantized is None and looked_at is not None:
            with stages.stage("cache") as stage:
                source, stage.skipped = calibrate_cache(recipe, checkpoint, looked_at, artifact.path, key, progress)
        with stages.stage("parameters") as stage:
            table = stream_params(recipe, source, artifact.path, rescaling, progress)
            stage.bytes = sum(file.file_bytes for file in table.files.values())
        with stages.stage("graphs") as stage:
            kept = quantized.kept if quantized else None
            peak = export_into(artifact.path, recipe, checkpoint, contract, table, rescaling, key, kept)
            stage.child_rss_bytes, stage.skipped = peak or 0, peak is None
            stage.bytes = sum((artifact.path / file).stat().st_size for file in graph_files(recipe, checkpoint))
        with stages.stage("files"):
            copy_model_files(recipe, checkpoint, artifact.path)
        result = None
        manifest = describe(recipe, checkpoint, contract, table, rescaling, artifact.path, key)
        manifest |= {"calibration": dataset, "quantization": quantized.to_json() if quantized else None}
        manifest["kernels"] = backend_for(recipe).kernels(
            recipe, checkpoint.config, quantized.kept if quantized else None
        )
        if quantized and recipe.sensitivity:
            with stages.stage("sensitivity") as stage:
                manifest["sensitivity"], stage.skipped = layer_sensitivity(
                    checkpoint, manifest, quantized.window, artifact.path, key, progress
                )
        if parity:
            with stages.stage("parity"):
                result = run_gate(recipe, checkpoint, artifact.path, manifest)
            manifest |= {"parity": result.to_json()}
            manifest["ledger"] = [asdict(entry) for entry in backend_for(recipe).ledger(manifest)]
        manifest["stages"] = stages.to_json()
        write_report(artifact.path, manifest)
        if result is not None and not result.passed and recipe.parity.gate:
            raise GateError(
                "the artifact does not compute the model: " + "; ".join(result.failures()),
                where=str(artifact.path),
                next_step=f"read {artifact.path / 'report.html'}; " + advice(recipe, result),
            )
        artifact.commit(manifest)
    return CompileResult(out, tuple(stages.done), False, manifest["parity"])


def backend_for(recipe: Recipe) -> Backend:
    """Who writes the graphs."""
    return backend(recipe.backend.type)


def parts_in(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Part, ...]:
    """What the artifact is divided into: one part, or a rank of a stage each."""
    return parts_of(checkpoint.config.num_hidden_layers, recipe.split_points, recipe.ranks)


def graph_files(recipe: Recipe, checkpoint: Checkpoint) -> list[str]:
    """Every .onnx file, by its path in the artifact."""
    return [part.file(f"{graph}.onnx") for part in parts_in(recipe, checkpoint) for graph in backend_for(recipe).graphs]


def scheme_of(recipe: Recipe) -> Scheme:
    """How parameters are stored, in a scheme that this version builds; `check_built` has refused the others."""
    return cast(Scheme, stored_scheme(recipe.weights))


def input_key(recipe: Recipe, checkpoint: Checkpoint, dataset: dict[str, Any] | None) -> str:
    """One hash over what the artifact depends on: recipe, checkpoint, calibration text, program, tracing libraries."""
    resolved = recipe.resolved()
    resolved.pop("workspace", None)
    parts = [resolved, checkpoint.fingerprint(), dataset, code_version(), tool_versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def code_version() -> str:
    """sha256 over this package and source_code/: another version of the code never continues an older one's work."""
    digest = hashlib.sha256()
    for root in (paths.PACKAGE, paths.source_code_dir()):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def stream_params(
    recipe: Recipe,
    source: Checkpoint | Overlay,
    out: Path,
    rescaling: Rescaling | None = None,
    progress: Progress | None = None,
) -> ParamTable:
    """Step 8: every tensor read, cast or quantized, written and hashed in row blocks; resumable per tensor."""
    parts = parts_of(source.config.num_hidden_layers, recipe.split_points, recipe.ranks)
    stored = source.stored if isinstance(source, Overlay) else None
    storage = recipe.storage_for(source.config.hidden_size)
    lengths, cache, form = recipe.context_length, recipe.int8_cache, backend_for(recipe).codes(recipe)
    plans = [
        build_plan(source.config, scheme_of(recipe), lengths, rescaling, part, stored, storage, cache, form)
        for part in parts
    ]
    total = sum(spec.nbytes for plan in plans for spec in plan)
    rows: list[ParamRow] = []
    for part, plan in zip(parts, plans, strict=True):
        before = sum(row.nbytes for row in rows)
        table = write_params(
            source,
            plan,
            out / part.file(PARAMS),
            journal=out / part.file("params.journal"),
            workers=recipe.workspace.workers,
            progress=None if progress is None else shifted(progress, before, total),
        )
        rows += table.moved(part.file(PARAMS)).rows
    return ParamTable(tuple(rows))


def shifted(progress: Progress, before: int, total: int) -> Progress:
    """Progress of one parameter file as that of all of them."""
    return lambda done, _: progress(min(before + done, total), total)


def export_into(
    out: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    contract: GraphContract,
    table: ParamTable,
    rescaling: Rescaling | None,
    key: str,
    kept: tuple[str, ...] | None = None,
) -> int | None:
    """Steps 5, 6 and 9: graphs without weights that point into the parameter file.

    Returns:
        Peak RSS in bytes of a process that did it, 0 when it was this one; None when it was done already.
    """
    done = out / "graphs.done"
    mark = f"{key} {table.digest}"
    files = graph_files(recipe, checkpoint)
    if done.exists() and done.read_bytes() == mark.encode() and all((out / file).exists() for file in files):
        return None
    from gemma_deploy.graph.external import write_graph

    give_memory_back()  # of the parameters' row blocks
    job = ExportJob(recipe, checkpoint.config, contract, parts_in(recipe, checkpoint), table, rescaling, kept)
    graphs, peak = backend_for(recipe).export(job)
    for file, graph in graphs.items():
        write_graph(graph, out / file)
    done.write_text(mark)
    return peak


def copy_model_files(recipe: Recipe, checkpoint: Checkpoint, out: Path) -> None:
    """config.json, generation_config.json, the back end's own and the tokenizer, as files of the artifact's own."""
    (out / "config.json").write_text(json.dumps(checkpoint.config_dict(), indent=2, sort_keys=True) + "\n")
    config = checkpoint.config
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name, content in backend_for(recipe).files(recipe, config).items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    write_tokenizer(checkpoint, out, link=False)


def describe(
    recipe: Recipe,
    checkpoint: Checkpoint,
    contract: GraphContract,
    table: ParamTable,
    rescaling: Rescaling | None,
    out: Path,
    key: str,
) -> dict[str, Any]:
    """The manifest, without parity, stages and file hashes."""
    parts, storage = parts_in(recipe, checkpoint), recipe.storage_for(checkpoint.config.hidden_size)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": recipe.name,
        "key": key,
        "tool": tool_versions(),
        "recipe": recipe.resolved(),
        "carried_for_the_vendor": list(recipe.vendor_keys()),
        "checkpoint": {
            "path": checkpoint.path.name,
            "format": checkpoint.format,
            "fingerprint": checkpoint.fingerprint(),
            "fingerprint_without_times": checkpoint.fingerprint(times=False),
        },
        "model": checkpoint.config.to_dict(),
        "scheme": recipe.weights,
        "int8_cache": recipe.int8_cache,
        "storage": storage.to_json() if recipe.int8_weights else None,
        "contract": contract.to_json(),
        "parts": [describe_part(part, contract) for part in parts] if len(parts) > 1 else [],
        "op_census": {file.removesuffix(".onnx"): op_census(out / file) for file in graph_files(recipe, checkpoint)},
        "calibration": None,
        "quantization": None,
        "params": table.to_json(),
        "rescaling": None if rescaling is None else rescaling.to_json(),
        "parity": None,
        "stages": [],
    }
    return manifest | {"ledger": [asdict(entry) for entry in backend_for(recipe).ledger(manifest)]}


def describe_part(part: Part, contract: GraphContract) -> dict[str, Any]:
    """One rank of one stage: its folder, layers [start, stop), and what its graphs take and give."""
    span = part.span
    return {
        "folder": part.folder,
        "stage": span.name,
        "layers": [span.start, span.stop],
        "rank": part.rank,
        "ranks": part.ranks,
        "contract": contract.of_part(part).to_json(),
    }


def advice(recipe: Recipe, result: ParityResult) -> str:
    """What to do about a failed gate."""
    if any(line.name.startswith("headroom") and not line.passed for line in result.lines):
        return "this model's activations do not fit float16: use backend.dtype int8, bf16 or fp32"
    if any(line.comparison == STORED_WEIGHTS and not line.passed for line in result.lines):
        return "the file does not hold the checkpoint's weights: a bug in gemma-deploy, please report it with that page"
    exact = [line for line in result.lines if line.name == "relative error"]
    if recipe.weights in QUANTIZERS and exact and all(line.passed for line in exact):
        return (
            "the graphs are right, but rounding loses too much: calibrate on text like the one it will see (dataset), "
            "or ask for less (w8a16_gptq, a table in smaller groups, backend.dtype fp32)"
        )
    if recipe.weights == "w8a16" and all(line.passed for line in result.lines if line.comparison != "weights"):
        return "a matrix loses too much in int8: use backend.dtype bf16, fp16 or fp32"
    return "the graphs do not compute what the checkpoint says: a bug in gemma-deploy, please report it with that page"


def run_gate(recipe: Recipe, checkpoint: Checkpoint, out: Path, manifest: dict[str, Any]) -> ParityResult:
    """Step 11: hf = patched = artifact on real text and random tokens, prefill and every decode step."""
    from gemma_deploy.proving import run_parity

    return run_parity(
        out,
        checkpoint.path,
        manifest=manifest,
        text=recipe.parity.text,
        prompt_tokens=recipe.parity.prompt_tokens,
        decode_tokens=recipe.parity.decode_tokens,
    )
