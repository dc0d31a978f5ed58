"""Whether this machine has the memory and disk for a streaming pass, before it begins."""

from __future__ import annotations

from pathlib import Path

from gemma_deploy.calibration.states import IN_MEMORY_BYTES
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.errors import PreflightError
from gemma_deploy.machine import Machine, gib, size

# torch, transformers, a 256k-token tokenizer and pyarrow: 0.65 GiB measured on the 270M model, and a margin.
BASE_BYTES = 800 << 20
PROCESS_BYTES = 400 << 20  # torch and transformers in a further process; torch alone has 0.34 GiB
SCORES = 3  # arrays [heads, seqlen, seqlen] alive at once: scores, masked scores, probabilities


def memory_bytes(config: ModelConfig, nsamples: int, seqlen: int, processes: int = 1) -> int:
    """Estimated peak: the libraries, one layer in float32, its activations for one window, small hidden states.

    Further processes have the libraries, the layer and a window each.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights = 3 * hidden * inner + 2 * hidden * config.head_dim * (heads + kv_heads)
    activations = SCORES * heads * seqlen * seqlen + seqlen * (4 * inner + 8 * hidden)
    states = states_bytes(config, nsamples, seqlen)
    workers = processes * (PROCESS_BYTES + 4 * (weights + activations)) if processes > 1 else 0
    return BASE_BYTES + 4 * (weights + activations) + workers + (states if states <= IN_MEMORY_BYTES else 0)


def states_bytes(config: ModelConfig, nsamples: int, seqlen: int) -> int:
    """Hidden states of all windows."""
    return 4 * nsamples * seqlen * config.hidden_size


def check_room(
    config: ModelConfig,
    nsamples: int,
    seqlen: int,
    workspace: Path,
    machine: Machine | None = None,
    processes: int = 1,
) -> None:
    """Refuse a pass this machine cannot hold.

    Raises:
        PreflightError: listing what is short.
    """
    machine = machine or Machine.measure(workspace)
    memory, states = memory_bytes(config, nsamples, seqlen, processes), states_bytes(config, nsamples, seqlen)
    problems = []
    if memory > machine.ram_bytes:
        problems.append(f"memory: {gib(memory)} needed, {gib(machine.ram_bytes)} left ({machine.ram_source})")
    if states > IN_MEMORY_BYTES and states > machine.disk_free_bytes:
        problems.append(f"disk: {size(states)} needed for hidden states, {size(machine.disk_free_bytes)} free")
    if problems:
        raise PreflightError(
            f"{nsamples} windows of {seqlen} tokens do not fit on this machine",
            where=str(workspace),
            problems=problems,
            next_step="use a smaller --seqlen or --nsamples, another --workspace, or a larger machine",
        )
