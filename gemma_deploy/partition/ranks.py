"""Tensor parallelism: which rows or columns of a tensor a rank holds.

q, k, v, gate, up, the table and the LM head are divided by rows (outputs), o and down by columns (inputs); their
partial results are added up (AllReduce). Norms are repeated. Megatron-LM's scheme, https://arxiv.org/abs/1909.08053.
"""

from __future__ import annotations

import math
from typing import Literal

from gemma_deploy.checkpoint import ModelConfig

Axis = Literal["rows", "columns"]
Blocks = tuple[tuple[int, int], ...]
BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
BY_COLUMNS = ("o_proj", "down_proj")


def sharding(name: str, dimensions: int = 1) -> Axis | None:
    """How a parameter is divided, by its name (`....weight` or `....scale`); None when every rank has all of it.

    Args:
        dimensions: of a scale: 2 where groups of columns have their own.
    """
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module in BY_ROWS and not name.endswith(".column_scale"):
        return "rows"
    if module in BY_COLUMNS and (name.endswith(".weight") or dimensions == 2):
        return "columns"
    return None  # norms, rotary tables, and the scale of a matrix divided by columns: one for each whole row


def kv_heads_of(config: ModelConfig, ranks: int) -> int:
    """KV heads of one rank; more in all than the model has where `ranks` does not divide them."""
    return math.lcm(config.num_key_value_heads, ranks) // ranks


def kv_head_blocks(config: ModelConfig, rank: int, ranks: int) -> Blocks:
    """Heads [start, stop) of the model that a rank's KV heads are, a block for each run of neighbours."""
    count = kv_heads_of(config, ranks)
    copies = count * ranks // config.num_key_value_heads
    heads = [(rank * count + i) // copies for i in range(count)]
    blocks: list[tuple[int, int]] = []
    for head in heads:
        if blocks and blocks[-1][1] == head:
            blocks[-1] = (blocks[-1][0], head + 1)
        else:
            blocks.append((head, head + 1))
    return tuple(blocks)


def row_blocks(name: str, rows: int, config: ModelConfig, rank: int, ranks: int) -> Blocks:
    """Rows [start, stop) of a tensor divided by rows that a rank holds, in order."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module in ("k_proj", "v_proj"):
        size = config.head_dim
        return tuple((start * size, stop * size) for start, stop in kv_head_blocks(config, rank, ranks))
    return ((rank * rows // ranks, (rank + 1) * rows // ranks),)


def input_channels(config: ModelConfig, ranks: int) -> dict[str, int]:
    """Columns of each kind of linear that one rank holds."""
    return {
        "q_proj, k_proj, v_proj, gate_proj, up_proj": config.hidden_size,
        "o_proj": config.num_attention_heads * config.head_dim // ranks,
        "down_proj": config.intermediate_size // ranks,
    }


def repeated_heads(config: ModelConfig, ranks: int) -> str | None:
    """How KV heads are repeated, as a sentence; None where every rank has heads of its own."""
    kv, total = config.num_key_value_heads, kv_heads_of(config, ranks) * ranks
    if total == kv:
        return None
    heads = f"{kv} key/value head{'s' if kv > 1 else ''}"
    return (
        f"tp {ranks}: the model's {heads} {'are' if kv > 1 else 'is'} repeated to {total}, {total // ranks} in each "
        f"rank: k_proj, v_proj and the KV cache take {total // kv} times the memory over all ranks"
    )


def obstacles(config: ModelConfig, ranks: int, align_qkv: bool) -> list[str]:
    """Why a model cannot be divided among `ranks`; empty when it can."""
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    problems = []
    if heads % ranks:
        problems.append(f"{ranks} ranks do not divide the {heads} attention heads")
    if kv % ranks and ranks % kv and not align_qkv:
        problems.append(
            f"{ranks} ranks neither divide the {kv} key/value heads nor are a multiple of them; "
            "set frontend.model_kwargs.align_qkv: true to repeat some of them"
        )
    for what, count in (("intermediate_size", config.intermediate_size), ("vocab_size", config.vocab_size)):
        if count % ranks:
            problems.append(f"{ranks} ranks do not divide the {what} {count}")
    return problems
