"""Tensor parallelism: which rows or columns of a tensor a rank holds.

q, k, v, gate, up, the tables and the LM head are divided by rows (outputs), o and down by columns (inputs); their
partial results are added up (AllReduce). Norms are repeated, and the linears around vectors of tokens. Megatron-LM's
scheme, https://arxiv.org/abs/1909.08053. Of a mixture a rank has some experts whole, and what they make is added up.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from gemma_deploy.architectures import ROWS, Axis, LayerSpec
from gemma_deploy.architectures.blocks import Experts
from gemma_deploy.names import CACHE_FACTOR, HEAD, PER_LAYER_TABLE

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

Blocks = tuple[tuple[int, int], ...]
EXPERTS = Experts.down.rpartition(".")[0]


@cache
def _axes() -> dict[str, Axis]:
    """By the last part of a module's name: what reads a normed stream has rows of its own, what adds to it columns."""
    axes: dict[str, Axis] = {"embed_tokens": "rows", PER_LAYER_TABLE.rpartition(".")[2]: "rows", HEAD: "rows"}
    for branch in (branch for row in ROWS for branch in row.branches):
        axes |= dict.fromkeys((reader.rpartition(".")[2] for reader in branch.entry.readers), "rows")
        axes |= dict.fromkeys((reader.rpartition(".")[2] for reader in branch.exit.readers), "columns")
    return axes


def sharding(name: str, dimensions: int = 1) -> Axis | None:
    """How a parameter is divided, by its name (`....weight` or `....scale`); None when every rank has all of it.

    Args:
        dimensions: of a scale: 2 where groups of columns have their own.
    """
    if name.endswith(f".{CACHE_FACTOR}") or is_stack(name):
        return "rows"
    axis = _axes().get(name.rpartition(".")[0].rpartition(".")[2])
    if axis == "rows" and not name.endswith(".column_scale"):
        return "rows"
    if axis == "columns" and (name.endswith(".weight") or dimensions == 2):
        return "columns"
    return None  # norms, rotary tables, and the scale of a matrix divided by columns: one for each whole row


def is_stack(name: str) -> bool:
    """Whether a tensor holds something of each expert, whose first dimension is divided."""
    return f".{EXPERTS}." in name


def kv_heads_of(kv_heads: int, ranks: int) -> int:
    """KV heads of one rank; more in all than there are where `ranks` does not divide them."""
    return math.lcm(kv_heads, ranks) // ranks


def kv_head_blocks(kv_heads: int, rank: int, ranks: int) -> Blocks:
    """Heads [start, stop) of a layer that a rank's KV heads are, a block for each run of neighbours."""
    count = kv_heads_of(kv_heads, ranks)
    copies = count * ranks // kv_heads
    heads = [(rank * count + i) // copies for i in range(count)]
    blocks: list[tuple[int, int]] = []
    for head in heads:
        if blocks and blocks[-1][1] == head:
            blocks[-1] = (blocks[-1][0], head + 1)
        else:
            blocks.append((head, head + 1))
    return tuple(blocks)


def row_blocks(name: str, rows: int, layer: LayerSpec | None, *, rank: int, ranks: int) -> Blocks:
    """Rows [start, stop) of a tensor divided by rows that a rank holds, in order.

    Args:
        name: of a parameter; layer: that it belongs to, None where it is no layer's.
    """
    module = name.rpartition(".")[0]
    of_cache = name.endswith(f".{CACHE_FACTOR}")
    if layer is not None and (of_cache or any(module.endswith(f".{maker}") for _, maker in layer.caches)):
        size = layer.head_dim
        blocks = kv_head_blocks(layer.kv_heads, rank, ranks)
        return tuple((start * size, stop * size) for start, stop in blocks)
    return ((rank * rows // ranks, (rank + 1) * rows // ranks),)


def input_channels(config: ModelConfig, ranks: int) -> dict[str, int]:
    """Columns of each kind of linear that one rank holds, kinds of equal ones together."""
    found: dict[tuple[str, int], list[str]] = {}
    for layer in config.templates:
        for linear in layer.linears:
            whole = _axes().get(linear.kind, "rows") == "rows"
            columns = linear.in_features if whole else linear.in_features // ranks
            kinds = found.setdefault(("" if whole else linear.kind, columns), [])
            if linear.kind not in kinds:
                kinds.append(linear.kind)
        for name, shape in layer.experts.stacks(layer.hidden_size).items() if layer.experts else ():
            kinds = found.setdefault((name, shape[-1]), [])
            if name not in kinds:
                kinds.append(name)
    return {", ".join(kinds): columns for (_, columns), kinds in found.items()}


def repeated_heads(config: ModelConfig, ranks: int) -> str | None:
    """How KV heads are repeated, as a sentence; None where every rank has heads of its own."""
    found = []
    for kv in dict.fromkeys(layer.kv_heads for layer in config.layers):
        total = kv_heads_of(kv, ranks) * ranks
        if total != kv:
            heads = f"{kv} key/value head{'s' if kv > 1 else ''}"
            found.append(
                f"the model's {heads} {'are' if kv > 1 else 'is'} repeated to {total}, {total // ranks} in each "
                f"rank: k_proj, v_proj and the KV cache take {total // kv} times the memory over all ranks"
            )
    return f"tp {ranks}: {'; '.join(found)}" if found else None


def obstacles(config: ModelConfig, ranks: int, align_qkv: bool) -> list[str]:
    """Why a model cannot be divided among `ranks`; empty when it can."""
    heads = config.num_attention_heads
    problems = []
    if heads % ranks:
        problems.append(f"{ranks} ranks do not divide the {heads} attention heads")
    for kv in dict.fromkeys(layer.kv_heads for layer in config.layers):
        if kv % ranks and ranks % kv and not align_qkv:
            problems.append(
                f"{ranks} ranks neither divide the {kv} key/value heads nor are a multiple of them; "
                "set frontend.model_kwargs.align_qkv: true to repeat some of them"
            )
    widths = dict.fromkeys(("intermediate_size", layer.intermediate_size) for layer in config.layers)
    rows = {"vocab_size": config.vocab_size}
    if config.per_layer is not None:
        rows["vocab_size_per_layer_input"] = config.per_layer.rows
    for layer in config.templates:
        if layer.experts is not None:
            rows["num_experts"] = layer.experts.count
    for what, count in (*widths, *rows.items()):
        if count % ranks:
            problems.append(f"{ranks} ranks do not divide the {what} {count}")
    return problems
