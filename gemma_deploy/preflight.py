"""Will this machine do the job? Memory, disk and time of every stage, estimated before any work.

Step 3 of the data path: recipe + opened checkpoint -> `Plan`. Reads no weight and imports no torch. The figures are
estimates from tensor shapes and measured rates; only the artifact's parameter bytes are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast

from gemma_deploy.calibration.points import TOKENS
from gemma_deploy.calibration.room import memory_bytes, workers_bytes
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.errors import PreflightError
from gemma_deploy.machine import Machine, gib, nearest_existing, size
from gemma_deploy.params.plan import Scheme, build_plan
from gemma_deploy.parity.cases import prompt_length
from gemma_deploy.parity.maxima import SEQLEN, TEXT_WINDOWS
from gemma_deploy.partition import parts_of
from gemma_deploy.reading import is_file
from gemma_deploy.recipe import Recipe, check_built
from gemma_deploy.schemes import QUANTIZERS, stored_scheme
from gemma_deploy.workdir import partial_of

GIB, MIB = 1 << 30, 1 << 20

# Peak RSS of a stage beyond its data, measured with transformers 5.23, torch 2.13 CPU on 2 cores of AMD Milan:
BASE_BYTES = int(0.45 * GIB)  # torch and numpy imported (torch alone: 0.34)
EXPORT_BYTES = int(0.55 * GIB)  # a gemma-2b-shaped decode graph traced and converted (shared/design.md, section 3)
BLOCK_BYTES = 64 * MIB  # one row block as float32; source rows, codes and a temporary come to as much again
BLOCK_COPIES = 3
GRAPH_BYTES = 8 * MIB  # both .onnx files, manifest, report
# Rates on the same machine; the disk's are a 1 GiB dd without other load, the others a 64 MiB float32 block in numpy.
READ_BYTES_PER_S = 2.0e9
WRITE_BYTES_PER_S = 0.8e9
CAST_BYTES_PER_S = 1.5e9  # float32 bytes cast and hashed
QUANTIZE_BYTES_PER_S = 0.45e9  # float32 bytes rounded to int8 per row, with SQNR
FLOPS_PER_S = 1.0e11  # float32 GEMM on 2 cores (117 measured; torch 113, ORT 151 in the design notes)
STREAM_BYTES_PER_S = 1.0e9  # float32 bytes read from the checkpoint, widened and multiplied, a matrix at a time
IMPORT_SECONDS = 4.0
EXPORT_SECONDS = 6.0
TOKENIZER_BYTES = 256 * MIB  # a vocabulary of 262,144 read by `tokenizers`
LOGIT_BYTES = 5 * 32 * MIB  # a block of logits of every source, see parity/compare.py
PIECE_ELEMENTS = 1 << 23  # of a matrix that is solved at a time (quantization/solver.py)
PIECE_ARRAYS = 8  # float32 arrays of that size that are alive together
LAYER_PASSES = 1.2  # of a window through a layer: once, waiting at each of the groups of linears; norms and files
SENSITIVITY_TOKENS, HEAD_BYTES = 256, 64 * MIB  # parity/sensitivity.py
SESSION_BYTES = 1.15  # of a packed int8 weight with its scales
TORCH_RUNS = 3  # transformers' class, the patched class, the patched class with the artifact's weights


class TensorFacts(Protocol):
    """What preflight asks of a `checkpoint.TensorInfo`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""

    @property
    def nbytes(self) -> int:
        """Bytes in the source file."""


class CheckpointFacts(Protocol):
    """What preflight asks of a `checkpoint.Checkpoint`."""

    @property
    def path(self) -> Path:
        """Directory or .gguf file."""

    @property
    def config(self) -> ModelConfig:
        """What the weights mean."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Name -> `TensorFacts`."""


@dataclass(frozen=True)
class Stage:
    """Estimate of one stage: peak memory, bytes it leaves on disk, wall time."""

    name: str
    what: str
    ram_bytes: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a compile will take, and what the machine lacks for it.

    Args:
        name: the recipe's name.
        scheme: how the parameters are stored.
        out: where the artifact goes.
        parameter_bytes: exact size of the tensors in params.safetensors.
        stages: estimates in the order of work.
        machine: what was measured.
        shortfalls: plain sentences; empty when the job fits.
        notes: what the user should know although it does not stop the job.
    """

    name: str
    scheme: str
    out: Path
    parameter_bytes: int
    stages: tuple[Stage, ...]
    machine: Machine
    shortfalls: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def peak_ram_bytes(self) -> int:
        """Memory of the largest stage."""
        return max(stage.ram_bytes for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """What all stages leave on disk together."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        totals = {"peak_ram_bytes": self.peak_ram_bytes, "disk_bytes": self.disk_bytes, "seconds": self.seconds}
        plain = asdict(self) | {"out": str(self.out)} | totals
        return plain | {key: list(plain[key]) for key in ("stages", "shortfalls", "notes")}


def preflight(
    recipe: Recipe,
    checkpoint: CheckpointFacts,
    *,
    out: Path | None = None,
    parity: bool = True,
    machine: Machine | None = None,
) -> Plan:
    """Refuse a job this machine cannot finish, before any work.

    Raises:
        PreflightError: lists everything that is short, with the figures.
    """
    plan = make_plan(recipe, checkpoint, out=out, parity=parity, machine=machine)
    if plan.shortfalls:
        raise PreflightError(
            "this machine cannot do the job as asked",
            where=f"recipe {recipe.name}",
            problems=plan.shortfalls,
            next_step="see all stages with `gemma-deploy compile RECIPE --dry-run`",
        )
    return plan


def make_plan(
    recipe: Recipe,
    checkpoint: CheckpointFacts,
    *,
    out: Path | None = None,
    parity: bool = True,
    machine: Machine | None = None,
) -> Plan:
    """Estimate every stage; shortfalls are listed in the plan, not raised.

    Args:
        recipe: what to build.
        checkpoint: the opened checkpoint.
        out: the artifact's directory (`workspace.path`/NAME by default).
        parity: whether the gate runs at the end.
        machine: what the machine has; measured when None.

    Raises:
        NotBuiltError: the recipe asks for what this version does not do.
    """
    check_built(recipe)
    out = out or Path(recipe.workspace.path) / recipe.name
    machine = machine or Machine.measure(out)
    tensors = _needed(checkpoint)
    elements = sum(prod(tensor.shape) for tensor in tensors.values())
    parameters = parameter_bytes(recipe, checkpoint)
    stages = [_ranges_stage(recipe, checkpoint.config, tensors, elements)] if recipe.weights == "fp16" else []
    if recipe.weights in QUANTIZERS:
        stages.append(_quantize_stage(recipe, checkpoint.config, tensors, machine))
    elif recipe.int8_cache:
        stages.append(_cache_stage(recipe, checkpoint.config, tensors, machine))
    stages += [
        _params_stage(recipe, tensors, elements, parameters, machine),
        _graphs_stage(recipe),
    ]
    if recipe.sensitivity:
        stages.append(_sensitivity_stage(checkpoint.config, tensors))
    if parity:
        stages.append(_parity_stage(recipe, checkpoint.config, tensors, elements))
    drafted = Plan(recipe.name, recipe.scheme, out, parameters, tuple(stages), machine, (), ())
    return replace(drafted, shortfalls=_shortfalls(drafted, recipe), notes=_notes(checkpoint))


def _needed(checkpoint: CheckpointFacts) -> dict[str, TensorFacts]:
    """Tensors that become parameters: an LM head stored beside a tied table is not one."""
    tied = checkpoint.config.tie_word_embeddings
    return {name: one for name, one in checkpoint.tensors.items() if not (tied and name == "lm_head.weight")}


def parameter_bytes(recipe: Recipe, checkpoint: CheckpointFacts) -> int:
    """Exact bytes of the tensors in all parameter files, rotary tables included, headers excluded."""
    config, scheme = checkpoint.config, cast(Scheme, stored_scheme(recipe.weights))
    storage = recipe.storage_for(config.hidden_size)
    parts = parts_of(config.num_hidden_layers, recipe.split_points, recipe.ranks)
    length, cache = recipe.context_length, recipe.int8_cache
    plans = (build_plan(config, scheme, length, part=part, storage=storage, int8_cache=cache) for part in parts)
    return sum(spec.nbytes for plan in plans for spec in plan)


def _params_stage(
    recipe: Recipe, tensors: Mapping[str, TensorFacts], elements: int, parameters: int, machine: Machine
) -> Stage:
    workers = max(1, min(recipe.workspace.workers, len(tensors)))
    largest = max(4 * prod(tensor.shape) for tensor in tensors.values())
    ram = BASE_BYTES + workers * BLOCK_COPIES * min(BLOCK_BYTES, largest)
    source = sum(tensor.nbytes for tensor in tensors.values())
    rate = QUANTIZE_BYTES_PER_S if recipe.int8_weights else CAST_BYTES_PER_S
    compute = 4 * elements / (rate * min(workers, machine.cpus))
    seconds = source / READ_BYTES_PER_S + compute + parameters / WRITE_BYTES_PER_S
    return Stage(
        "parameters", f"{len(tensors)} tensors as {recipe.weights}, {workers} at a time", ram, parameters, seconds
    )


def _graphs_stage(recipe: Recipe) -> Stage:
    if recipe.onnxruntime:  # built, not traced
        return Stage("graphs", "model.onnx, no weights", BASE_BYTES, GRAPH_BYTES, 1.0)
    seconds = IMPORT_SECONDS + EXPORT_SECONDS
    return Stage("graphs", "iter0 and iter1, no weights", EXPORT_BYTES, GRAPH_BYTES, seconds)


def _ranges_stage(recipe: Recipe, config: ModelConfig, tensors: Mapping[str, TensorFacts], elements: int) -> Stage:
    """As the gate's torch side: a block of one matrix at a time, activations of a few windows."""
    windows, seqlen = TEXT_WINDOWS + 1, min(SEQLEN, recipe.context_length)
    layers = sum(prod(tensor.shape) for name, tensor in tensors.items() if ".layers." in name)
    activations = 4 * windows * seqlen * (3 * config.intermediate_size + 2 * config.num_attention_heads * seqlen)
    flops = 2.0 * layers * windows * seqlen
    seconds = IMPORT_SECONDS + flops / FLOPS_PER_S + 4 * elements / STREAM_BYTES_PER_S
    ram = BASE_BYTES + TOKENIZER_BYTES + BLOCK_BYTES + activations
    return Stage("ranges", f"largest activations of {windows} windows of {seqlen} tokens", ram, 0, seconds)


def _quantize_stage(recipe: Recipe, config: ModelConfig, tensors: Mapping[str, TensorFacts], machine: Machine) -> Stage:
    """One layer's weights, the moments of one group of inputs, one window's activations; hidden states on disk."""
    nsamples, seqlen, layers = recipe.dataset.nsamples, recipe.dataset.seqlen, config.num_hidden_layers
    shapes = [t.shape for name, t in tensors.items() if ".layers.0." in name and len(t.shape) == 2]
    elements, widest = sum(prod(shape) for shape in shapes), max(shape[1] for shape in shapes)
    piece = min(PIECE_ELEMENTS, max(prod(shape) for shape in shapes))
    activations = 4 * seqlen * (3 * config.intermediate_size + 2 * config.num_attention_heads * seqlen)
    # Twice the moments: the factorization's products. The codes of the layer are kept beside its weights.
    held = 5 * elements + 2 * 4 * widest**2 + PIECE_ARRAYS * 4 * piece + activations
    quantizer = QUANTIZERS[recipe.weights]
    if quantizer.activations:  # tokens, their magnitudes and what these are divided into, and their rounding errors
        held += 4 * 4 * min(TOKENS, nsamples * seqlen) * widest
    hidden = 4 * nsamples * seqlen * (3 * config.hidden_size + widest)  # before and after the layer, and inside it
    tokens, inputs = nsamples * seqlen, {shape[1]: shape for shape in shapes}
    passes = 2.0 * LAYER_PASSES * elements * tokens
    moments = 2.0 * tokens * sum(columns**2 for columns in inputs)
    solving = sum(4.0 * shape[0] * shape[1] ** 2 for shape in shapes) + sum(columns**3 for columns in inputs)
    seconds = IMPORT_SECONDS + layers * (passes + moments + solving) / FLOPS_PER_S
    what = f"{recipe.weights}, {nsamples} windows of {seqlen} tokens, a layer at a time"
    workers = recipe.workspace.processes if recipe.workspace.cluster is None else 1
    memory, handed_over = workers_bytes(config, seqlen, processes=workers, threads=machine.cpus)
    ram, disk = BASE_BYTES + TOKENIZER_BYTES + held + memory, hidden + layers * elements + handed_over
    return Stage("quantize", what, ram, disk, seconds)


def _cache_stage(recipe: Recipe, config: ModelConfig, tensors: Mapping[str, TensorFacts], machine: Machine) -> Stage:
    """One layer in float32, windows that pass through it, hidden states on disk."""
    nsamples, seqlen, layers = recipe.dataset.nsamples, recipe.dataset.seqlen, config.num_hidden_layers
    elements = sum(prod(t.shape) for name, t in tensors.items() if ".layers.0." in name)
    processes = recipe.workspace.processes if recipe.workspace.cluster is None else 1
    ram = memory_bytes(config, nsamples, seqlen, processes, machine.cpus)
    hidden = 4 * nsamples * seqlen * config.hidden_size
    seconds = IMPORT_SECONDS + 2.0 * layers * elements * nsamples * seqlen / FLOPS_PER_S
    return Stage("cache", f"keys and values of {nsamples} windows of {seqlen} tokens", ram, hidden, seconds)


def _sensitivity_stage(config: ModelConfig, tensors: Mapping[str, TensorFacts]) -> Stage:
    """A window through all layers once for every layer, and as often through the LM head."""
    layers, elements = config.num_hidden_layers, sum(prod(t.shape) for n, t in tensors.items() if ".layers.0." in n)
    table = config.vocab_size * config.hidden_size
    flops = 2.0 * SENSITIVITY_TOKENS * layers * (layers * elements / 2 + table)
    ram = BASE_BYTES + TOKENIZER_BYTES + 4 * elements + 4 * HEAD_BYTES
    disk = 4 * (layers + 2) * SENSITIVITY_TOKENS * config.hidden_size
    what = f"each layer alone, {SENSITIVITY_TOKENS} tokens"
    return Stage("sensitivity", what, ram, disk, IMPORT_SECONDS + flops / FLOPS_PER_S)


def _parity_stage(recipe: Recipe, config: ModelConfig, tensors: Mapping[str, TensorFacts], elements: int) -> Stage:
    """A block of one matrix at a time, whatever the model's size; activations of the longest prompts."""
    width, steps = recipe.prefill_length, recipe.parity.decode_tokens
    tokens, _ = prompt_length(config, width, recipe.parity.prompt_tokens)
    layers = [prod(tensor.shape) for name, tensor in tensors.items() if ".layers." in name]
    # Graph: batch x P positions, a case at a time; torch: the text and the random case together, without padding.
    positions = max(recipe.batch * width, 2 * recipe.batch * (tokens + steps))
    activations = 4 * positions * (3 * config.intermediate_size + 2 * config.num_attention_heads * width)
    ram = BASE_BYTES + TOKENIZER_BYTES + LOGIT_BYTES + BLOCK_BYTES + activations
    if recipe.onnxruntime:  # the session a user will open, its weights packed
        ram += int(elements * (SESSION_BYTES if recipe.int8_weights else 4))
    flops = 2.0 * sum(layers) * 2 * recipe.batch * (width + TORCH_RUNS * (tokens + steps))
    seconds = IMPORT_SECONDS + flops / FLOPS_PER_S + (TORCH_RUNS + 2) * 4 * elements / STREAM_BYTES_PER_S
    return Stage("parity", f"{tokens} + {steps} tokens, text and random", ram, 0, seconds)


def _shortfalls(plan: Plan, recipe: Recipe) -> tuple[str, ...]:
    machine, lacking = plan.machine, []
    for stage in plan.stages:
        if stage.ram_bytes > machine.ram_bytes:
            remedy = {
                "parameters": "set workspace.workers: 1, or free memory"
                if recipe.workspace.workers > 1
                else "free memory",
                "quantize": "calibrate on shorter windows (dataset.seqlen), or free memory",
                "parity": "compare fewer tokens (parity.prompt_tokens), or free memory",
            }.get(stage.name, "free memory")
            lacking.append(
                f"memory: stage {stage.name} needs about {gib(stage.ram_bytes)}, "
                f"{gib(machine.ram_bytes)} is available ({machine.ram_source}): {remedy}"
            )
    need = plan.disk_bytes - _already_there(plan.out)
    if need > machine.disk_free_bytes:
        lacking.append(
            f"disk: {plan.out} needs {size(need)}, {size(machine.disk_free_bytes)} is free: "
            "free space, or set workspace.path to another disk"
        )
    if not machine.writable:
        lacking.append(
            f"workspace: {nearest_existing(plan.out)} cannot be written: set workspace.path to a directory that can"
        )
    text = recipe.parity.text
    if text is not None and not is_file(text):
        lacking.append(f"file: parity.text '{text}' is not a file: correct the path")
    return tuple(lacking)


def _already_there(out: Path) -> int:
    """Bytes an interrupted run left behind, which the next one continues."""
    partial = partial_of(out)
    return sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0


def _notes(checkpoint: CheckpointFacts) -> tuple[str, ...]:
    if checkpoint.path.suffix.lower() == ".gguf":
        return ("a GGUF file's weights are the dequantized ones: the artifact repeats that model, not the original",)
    return ()


def render(plan: Plan) -> Any:
    """The plan as a rich renderable: one row per stage, then what is available and what is short."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Plan for {plan.name} ({plan.scheme})", title_justify="left")
    table.add_column("stage")
    table.add_column("what")
    for heading in ("memory", "disk", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in plan.stages:
        disk = size(stage.disk_bytes) if stage.disk_bytes else "-"
        table.add_row(stage.name, stage.what, gib(stage.ram_bytes), disk, duration(stage.seconds))
    table.add_section()
    table.add_row("needed", "peak / sum / sum", gib(plan.peak_ram_bytes), size(plan.disk_bytes), duration(plan.seconds))
    machine = plan.machine
    table.add_row("available", machine.ram_source, gib(machine.ram_bytes), size(machine.disk_free_bytes), "")
    lines = [Text(f"artifact: {plan.out}, parameters {size(plan.parameter_bytes)} (exact)")]
    lines += [Text(f"note: {note}") for note in plan.notes]
    lines += [Text(f"short: {lack}", style="bold red") for lack in plan.shortfalls]
    if not plan.shortfalls:
        lines.append(Text("this machine can do it; nothing has been written"))
    return Group(table, *lines)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["Machine", "Plan", "Stage", "make_plan", "parameter_bytes", "preflight", "render"]
