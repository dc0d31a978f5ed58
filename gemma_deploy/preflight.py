"""Will this machine do the job? Memory, disk and time of every stage, estimated before any work.

Job -> `ResourcePlan`. Reads no weight and imports no torch. The figures are
estimates from tensor shapes and measured rates; only the artifact's parameter bytes are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from gemma_deploy.calibration.pipeline import Request
from gemma_deploy.calibration.points import TOKENS
from gemma_deploy.calibration.requirements import beside_bytes, memory_bytes, workers_bytes
from gemma_deploy.checkpoint import ModelConfig, TensorInfo
from gemma_deploy.errors import PreflightError
from gemma_deploy.estimates import (
    BASE_BYTES,
    BLOCK_BYTES,
    CAST_BYTES_PER_S,
    FLOPS_PER_S,
    HEAD_BYTES,
    IMPORT_SECONDS,
    LARGE_VOCABULARY,
    LAYER_PASSES,
    LEFT_BYTES,
    LOGIT_SOURCES,
    MOMENT_BYTES,
    PIECE_ARRAYS,
    PIECE_ELEMENTS,
    QUANTIZE_BYTES_PER_S,
    READ_BYTES_PER_S,
    RECORD_BYTES,
    SENSITIVITY_TOKENS,
    STREAM_BYTES_PER_S,
    TOKENIZER_BYTES,
    TORCH_RUNS,
    WRITE_BYTES_PER_S,
    WRITER_BYTES,
    StageEstimate,
)
from gemma_deploy.job import Job
from gemma_deploy.machine import Machine, gib, nearest_existing, size
from gemma_deploy.parity.cases import prompt_length
from gemma_deploy.parity.compare import BLOCK_BYTES as LOGIT_BYTES
from gemma_deploy.parity.compare import PROMPT_POSITIONS
from gemma_deploy.parity.maxima import SEQLEN, TEXT_WINDOWS
from gemma_deploy.reading import is_file
from gemma_deploy.workdir import partial_of


@dataclass(frozen=True)
class ResourcePlan:
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
        is_up_to_date: the artifact is there, and no stage would run.
    """

    name: str
    scheme: str
    out: Path
    parameter_bytes: int
    stages: tuple[StageEstimate, ...]
    machine: Machine
    shortfalls: tuple[str, ...]
    notes: tuple[str, ...]
    is_up_to_date: bool = False

    @property
    def peak_ram_bytes(self) -> int:
        """Memory of the largest stage."""
        return max((stage.ram_bytes for stage in self.stages), default=0)

    @property
    def has_room_beside(self) -> bool:
        """Whether the graphs can be made while the parameters are written."""
        together = sum(stage.ram_bytes for stage in self.stages if stage.name in ("parameters", "graphs"))
        return together <= self.machine.ram_bytes

    @property
    def disk_bytes(self) -> int:
        """What all stages leave on disk together."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: stages, their sums, shortfalls and notes."""
        totals = {"peak_ram_bytes": self.peak_ram_bytes, "disk_bytes": self.disk_bytes, "seconds": self.seconds}
        plain = asdict(self) | {"out": str(self.out)} | totals
        return plain | {key: list(plain[key]) for key in ("stages", "shortfalls", "notes")}


def preflight(
    job: Job,
    *,
    parity: bool = True,
    built: bool = False,
    machine: Machine | None = None,
    request: Request | None = None,
) -> ResourcePlan:
    """Refuse a job this machine cannot finish, before any work; see `make_plan`.

    Raises:
        PreflightError: lists everything that is short, with the figures.
    """
    plan = make_plan(job, parity=parity, built=built, machine=machine, request=request)
    if plan.shortfalls:
        raise PreflightError(
            "this machine cannot do the job as asked",
            where=f"recipe {job.name}",
            problems=plan.shortfalls,
            next_step="see all stages with `gemma-deploy compile RECIPE --dry-run`",
        )
    return plan


def make_plan(
    job: Job,
    *,
    parity: bool = True,
    built: bool = False,
    machine: Machine | None = None,
    request: Request | None = None,
) -> ResourcePlan:
    """Estimate every stage; shortfalls are listed in the plan, not raised.

    Args:
        parity: whether the gate runs at the end; built: everything is made, only to be measured.
        machine: what the machine has; measured when None.
        request: text that float16 looks at, where it looks at any.
    """
    machine = machine or Machine.measure(job.out)
    tensors = job.checkpoint.tensors
    elements = sum(prod(tensor.shape) for tensor in tensors.values())
    parameters = parameter_bytes(job)
    stages = [] if built else _building_stages(job, tensors, elements, parameters, machine, request)
    if job.quantizer.sensitivity:
        stages.append(_sensitivity_stage(job.config, tensors))
    if parity:
        stages.append(_parity_stage(job, tensors, elements))
    drafted = ResourcePlan(job.name, str(job.scheme), job.out, parameters, tuple(stages), machine, (), ())
    return replace(drafted, shortfalls=_shortfalls(drafted, job), notes=_notes(job))


def _building_stages(
    job: Job,
    tensors: Mapping[str, TensorInfo],
    elements: int,
    parameters: int,
    machine: Machine,
    request: Request | None,
) -> list[StageEstimate]:
    stages = [_ranges_stage(job, tensors, elements, request)] if job.rescales else []
    if job.scheme.calibrated:
        stages.append(_quantize_stage(job, machine))
    elif job.scheme.int8_cache:
        stages.append(_cache_stage(job, tensors, machine))
    graphs = job.backend.graphs_estimate()
    return [*stages, _params_stage(job, tensors, elements, parameters, machine), graphs, _files_stage(job)]


def parameter_bytes(job: Job) -> int:
    """Exact bytes of the tensors in all parameter files, rotary tables included, headers excluded."""
    return sum(spec.nbytes for plan in job.plans for spec in plan)


def _params_stage(
    job: Job, tensors: Mapping[str, TensorInfo], elements: int, parameters: int, machine: Machine
) -> StageEstimate:
    workers = max(1, min(job.workers.writers, len(tensors)))
    ram = _idle_bytes(job)
    source = sum(tensor.nbytes for tensor in tensors.values())
    rate = QUANTIZE_BYTES_PER_S if job.scheme.codes else CAST_BYTES_PER_S
    compute = 4 * elements / (rate * min(workers, machine.cpus))
    seconds = source / READ_BYTES_PER_S + compute + parameters / WRITE_BYTES_PER_S
    return StageEstimate(
        "parameters", f"{len(tensors)} tensors as {job.scheme.weights}, {workers} at a time", ram, parameters, seconds
    )


def _files_stage(job: Job) -> StageEstimate:
    """Copies of small files, of which the tokenizer's are the largest."""
    sizes = [file.stat().st_size for file in job.checkpoint.tokenizer_files()]
    return StageEstimate("files", "config, tokenizer", _idle_bytes(job), sum(sizes) + RECORD_BYTES, 0.1)


def widest_stream(config: ModelConfig) -> int:
    """Width of the widest MLP, and of what other streams there are beside the computed one, twice."""
    return max(layer.intermediate_size for layer in config.templates) + 2 * (config.carried - config.hidden_size)


def _idle_bytes(job: Job) -> int:
    """What the process holds whatever it does: more where torch is imported, and was at work."""
    looked = job.scheme.calibrates or job.rescales
    return BASE_BYTES + LEFT_BYTES if looked else WRITER_BYTES


def _ranges_stage(job: Job, tensors: Mapping[str, TensorInfo], elements: int, request: Request | None) -> StageEstimate:
    """As the gate's torch side: a block of one matrix at a time, activations of a few windows."""
    config, seqlen = job.config, request.seqlen if request else min(SEQLEN, job.spec.context)
    texts = request.nsamples if request else TEXT_WINDOWS
    windows = texts + 1  # and one of random tokens
    layers = sum(prod(tensor.shape) for name, tensor in tensors.items() if ".layers." in name)
    activations = 4 * windows * seqlen * (3 * widest_stream(config) + 2 * config.num_attention_heads * seqlen)
    flops = 2.0 * layers * windows * seqlen
    seconds = IMPORT_SECONDS + flops / FLOPS_PER_S + 4 * elements / STREAM_BYTES_PER_S
    ram = BASE_BYTES + TOKENIZER_BYTES + BLOCK_BYTES + activations
    what = f"largest activations of {texts} windows of {seqlen} tokens, and of one of random tokens"
    return StageEstimate("ranges", what, ram, 0, seconds)


def _quantize_stage(job: Job, machine: Machine) -> StageEstimate:
    """One layer's weights, the moments of one group of inputs, one window's activations; hidden states on disk."""
    config, nsamples, seqlen = job.config, job.dataset.nsamples, job.dataset.seqlen
    layers = config.num_hidden_layers
    templates = ([(linear.out_features, linear.in_features) for linear in one.linears] for one in config.templates)
    shapes = max(templates, key=lambda shapes: sum(map(prod, shapes)))
    elements, widest = sum(prod(shape) for shape in shapes), max(shape[1] for shape in shapes)
    piece = min(PIECE_ELEMENTS, max(prod(shape) for shape in shapes))
    activations = 4 * seqlen * (3 * widest_stream(config) + 2 * config.num_attention_heads * seqlen)
    # Twice the moments: the factorization's products. The codes of the layer are kept beside its weights.
    held = 5 * elements + 2 * 4 * widest**2 + PIECE_ARRAYS * 4 * piece + activations
    if (
        job.scheme.rounds_activations
    ):  # tokens, their magnitudes and what these are divided into, and their rounding errors
        held += 4 * 4 * min(TOKENS, nsamples * seqlen) * widest
    hidden = 4 * nsamples * seqlen * (4 * config.carried - config.hidden_size + widest)  # around a layer, and inside it
    tokens, inputs = nsamples * seqlen, {shape[1]: shape for shape in shapes}
    passes = 2.0 * LAYER_PASSES * elements * tokens
    moments = 2.0 * tokens * sum(columns**2 for columns in inputs)
    solving = sum(4.0 * shape[0] * shape[1] ** 2 for shape in shapes) + sum(columns**3 for columns in inputs)
    if (experts := config.templates[0].experts) is not None:
        held += MOMENT_BYTES
        solving += experts.count * (config.hidden_size**3 + experts.width**3)
    seconds = IMPORT_SECONDS + layers * (passes + moments + solving) / FLOPS_PER_S
    what = f"{job.scheme.weights}, {nsamples} windows of {seqlen} tokens, a layer at a time"
    workers = job.workers.processes if job.workers.cluster is None else 1
    memory, handed_over = workers_bytes(config, seqlen, processes=workers, threads=machine.cpus)
    ram, disk = BASE_BYTES + LEFT_BYTES + held + memory, hidden + layers * elements + handed_over
    disk += beside_bytes(config, nsamples, seqlen)
    return StageEstimate("quantize", what, ram, disk, seconds)


def _cache_stage(job: Job, tensors: Mapping[str, TensorInfo], machine: Machine) -> StageEstimate:
    """One layer in float32, windows that pass through it, hidden states on disk."""
    config, nsamples, seqlen = job.config, job.dataset.nsamples, job.dataset.seqlen
    layers = config.num_hidden_layers
    elements = sum(prod(t.shape) for name, t in tensors.items() if ".layers.0." in name)
    processes = job.workers.processes if job.workers.cluster is None else 1
    ram = memory_bytes(config, nsamples, seqlen, processes=processes, threads=machine.cpus)
    hidden = 4 * nsamples * seqlen * config.carried + beside_bytes(config, nsamples, seqlen)
    seconds = IMPORT_SECONDS + 2.0 * layers * elements * nsamples * seqlen / FLOPS_PER_S
    return StageEstimate("cache", f"keys and values of {nsamples} windows of {seqlen} tokens", ram, hidden, seconds)


def _sensitivity_stage(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> StageEstimate:
    """A window through all layers once for every layer, and as often through the LM head."""
    layers, elements = config.num_hidden_layers, sum(prod(t.shape) for n, t in tensors.items() if ".layers.0." in n)
    table = config.vocab_size * config.hidden_size
    flops = 2.0 * SENSITIVITY_TOKENS * layers * (layers * elements / 2 + table)
    ram = BASE_BYTES + TOKENIZER_BYTES + 4 * elements + 4 * HEAD_BYTES
    disk = 4 * (layers + 2) * SENSITIVITY_TOKENS * config.carried
    what = f"each layer alone, {SENSITIVITY_TOKENS} tokens"
    return StageEstimate("sensitivity", what, ram, disk, IMPORT_SECONDS + flops / FLOPS_PER_S)


def _parity_stage(job: Job, tensors: Mapping[str, TensorInfo], elements: int) -> StageEstimate:
    """A block of one matrix at a time, whatever the model's size; activations of the longest prompts."""
    config, width, steps, batch = job.config, job.spec.prefill, job.proof.decode_tokens, job.spec.batch
    tokens, _ = prompt_length(config, width, job.proof.prompt_tokens)
    layers = [prod(tensor.shape) for name, tensor in tensors.items() if ".layers." in name]
    # Graph: batch x P positions, a case at a time; torch: the text and the random case together, without padding.
    positions = max(batch * width, 2 * batch * (tokens + steps))
    # MLP or attention, one after the other; then the logits of all sources, when activations are gone.
    activations = 4 * positions * max(3 * widest_stream(config), 2 * config.num_attention_heads * width)
    compared = 2 * batch * (min(tokens, max(PROMPT_POSITIONS.values())) + steps)
    logits = LOGIT_SOURCES * min(LOGIT_BYTES, 4 * config.vocab_size * compared)
    left = LEFT_BYTES * min(config.vocab_size, LARGE_VOCABULARY) // LARGE_VOCABULARY
    ram = BASE_BYTES + left + max(logits, min(BLOCK_BYTES, 4 * max(layers)) + activations)
    ram += job.backend.proof_bytes(job.spec, elements)
    flops = 2.0 * sum(layers) * 2 * batch * (width + TORCH_RUNS * (tokens + steps))
    seconds = IMPORT_SECONDS + flops / FLOPS_PER_S + (TORCH_RUNS + 2) * 4 * elements / STREAM_BYTES_PER_S
    return StageEstimate("parity", f"{tokens} + {steps} tokens, text and random", ram, 0, seconds)


def _shortfalls(plan: ResourcePlan, job: Job) -> tuple[str, ...]:
    machine, lacking = plan.machine, []
    for stage in plan.stages:
        if stage.ram_bytes > machine.ram_bytes:
            remedy = {
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
    text = job.proof.text
    if text is not None and not is_file(text):
        lacking.append(f"file: parity.text '{text}' is not a file: correct the path")
    return tuple(lacking)


def _already_there(out: Path) -> int:
    """Bytes an interrupted run left behind, which the next one continues."""
    partial = partial_of(out)
    return sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0


def _notes(job: Job) -> tuple[str, ...]:
    checkpoint, taken = job.checkpoint, len(job.taken_over)
    if arrived := len(checkpoint.quantized):
        said = f"{taken} of {arrived} matrices that arrive quantized are taken over as they are"
        rest = "" if taken == arrived else "; the others are dequantized once, and treated as floats"
        return (f"{said}{rest}: the artifact repeats the quantized model, not the original",)
    if checkpoint.path.suffix.lower() == ".gguf":
        return ("a GGUF file's weights are the dequantized ones: the artifact repeats that model, not the original",)
    return ()


def render(plan: ResourcePlan) -> Any:
    """The plan as a rich renderable: one row per stage, then what is available and short; or that nothing is to do."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if plan.is_up_to_date:
        return Text(f"nothing has changed: {plan.out} is up to date, and nothing would be done")
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
    if machine.is_busy:
        lines.append(Text(f"note: the load average is {machine.load:.1f}: times above are those of idle cores"))
    lines += [Text(f"short: {lack}", style="bold red") for lack in plan.shortfalls]
    if not plan.shortfalls:
        lines.append(Text("this machine can do it; nothing has been written"))
    return Group(table, *lines)


def duration(seconds: float) -> str:
    """`40 s`, `3.8 min`, `12 min`, `3.5 h`; never less than was estimated, by more than its last digit."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    if seconds < 600:
        return f"{math.ceil(seconds / 6) / 10:g} min"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{math.ceil(seconds / 360) / 10:g} h"


__all__ = ["Machine", "ResourcePlan", "make_plan", "parameter_bytes", "preflight", "render"]
