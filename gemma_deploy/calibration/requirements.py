"""Whether this machine has the memory and disk for a streaming pass, before it begins."""

from __future__ import annotations

from math import prod
from pathlib import Path

from gemma_deploy.calibration.points import SHARD_TOKENS, cache_columns
from gemma_deploy.calibration.states import IN_MEMORY_BYTES
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.errors import PreflightError
from gemma_deploy.machine import Machine, gib, size

# torch, transformers, a 256k-token tokenizer and pyarrow: 0.65 GiB measured on the 270M model, and a margin.
BASE_BYTES = 800 << 20
PROCESS_BYTES = 400 << 20  # torch and transformers in a further process; torch alone has 0.34 GiB
MOMENT_ROWS = 512  # as observers.MOMENT_BLOCK
SCORES = 3  # arrays [heads, seqlen, seqlen] alive at once: scores, masked scores, probabilities


def workers_bytes(
    config: ModelConfig, seqlen: int, *, processes: int = 1, threads: int = 1, moments: bool = True
) -> tuple[int, int]:
    """Estimated memory and disk of passing windows in shards, beside one layer and one window's activations.

    Threads of one process take a shard's inputs and a window's activations each. Processes have their own libraries and
    their own copy of the layer as well, and hand moments over in files, as many as there are shards in flight.

    Args:
        processes: as `workspace.processes`; threads: of torch in one process.
        moments: for the quantizer; `calibrate` observes ranges, which take no room.
    """
    weights, window = _weights(config), _activations(config, seqlen)
    columns = max(linear.in_features for layer in config.templates for linear in layer.linears)
    shard = max(SHARD_TOKENS, seqlen) * columns if moments else 0
    if processes == 1:
        return 4 * ((threads - 1) * window + threads * shard), 0
    files = (processes + 1) * 2 * columns * (columns + MOMENT_ROWS) if moments else 0
    handed_over = 4 * weights  # copied by safetensors while it is written
    return handed_over + processes * (PROCESS_BYTES + 4 * (weights + window + shard)), handed_over + files


def memory_bytes(config: ModelConfig, nsamples: int, seqlen: int, *, processes: int = 1, threads: int = 1) -> int:
    """Estimated peak of `calibrate`: libraries, one layer in float32, activations of windows, small hidden states."""
    states = states_bytes(config, nsamples, seqlen)
    workers, _ = workers_bytes(config, seqlen, processes=processes, threads=threads, moments=False)
    held = 4 * (_weights(config) + _activations(config, seqlen)) + workers
    return BASE_BYTES + held + (states if states <= IN_MEMORY_BYTES and processes == 1 else 0)


def _weights(config: ModelConfig) -> int:
    """Elements of the matrices of the largest layer."""
    return max(
        sum(one.out_features * one.in_features for one in layer.linears)
        + (sum(map(prod, layer.experts.stacks(layer.hidden_size).values())) if layer.experts else 0)
        for layer in config.templates
    )


def _activations(config: ModelConfig, seqlen: int) -> int:
    """Elements alive while a window passes through a layer."""
    scores = SCORES * config.num_attention_heads * seqlen * seqlen
    widest = max(layer.intermediate_size for layer in config.templates)
    return scores + seqlen * (4 * widest + 8 * config.carried)


def states_bytes(config: ModelConfig, nsamples: int, seqlen: int) -> int:
    """Hidden states of all windows, all streams of them."""
    return 4 * nsamples * seqlen * config.carried


def beside_bytes(config: ModelConfig, nsamples: int, seqlen: int) -> int:
    """What layers read beside hidden states, on disk: vectors of the tokens that occur, keys and values of some layers.

    See beside.py; of most models nothing.
    """
    tokens, table = nsamples * seqlen, config.per_layer
    vectors = 0 if table is None else min(tokens, table.rows or config.vocab_size) * table.width
    return 4 * (vectors + sum(tokens * cache_columns(layer) for layer in config.cache_sources))


def check_room(
    config: ModelConfig,
    nsamples: int,
    seqlen: int,
    *,
    workspace: Path,
    machine: Machine | None = None,
    processes: int = 1,
) -> None:
    """Refuse a pass this machine cannot hold.

    Raises:
        PreflightError: listing what is short.
    """
    machine = machine or Machine.measure(workspace)
    memory, states = (
        memory_bytes(config, nsamples, seqlen, processes=processes, threads=machine.cpus),
        states_bytes(config, nsamples, seqlen),
    )
    problems = []
    if memory > machine.ram_bytes:
        problems.append(f"memory: {gib(memory)} needed, {gib(machine.ram_bytes)} left ({machine.ram_source})")
    disk = (states if states > IN_MEMORY_BYTES else 0) + beside_bytes(config, nsamples, seqlen)
    if disk > machine.disk_free_bytes:
        problems.append(f"disk: {size(disk)} needed for hidden states, {size(machine.disk_free_bytes)} free")
    if problems:
        raise PreflightError(
            f"{nsamples} windows of {seqlen} tokens do not fit on this machine",
            where=str(workspace),
            problems=problems,
            next_step="use a smaller --seqlen or --nsamples, another --workspace, or a larger machine",
        )
