"""Queries of layers that share keys and values, to a cache that holds a window alone.

GroupQueryAttention refuses sliding_window_cache where there are no new keys (ONNX Runtime 1.32). So the buffer is read
as a whole cache of the L(T) positions that are in it after the step (window.py has the formula), in order from its
beginning, and queries are turned by their own positions, which are given beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.onnxruntime.nodes import Nodes

INT32, INT64 = ir.DataType.INT32.value, ir.DataType.INT64.value


@dataclass(frozen=True)
class Held:
    """What a cache holds after a step, as GroupQueryAttention wants it: seqlens_k [B] and total_sequence_length [1]."""

    seqlens: ir.Value
    total: ir.Value


def held_positions(nodes: Nodes, last: ir.Value, buffer: ir.Value, *, window: int, name: str) -> Held:
    """Of a buffer, read as a whole cache.

    Args:
        last: [B] int32, T - 1 of each row, this step's tokens included; buffer: [B, Hk, C, D] after the step.
        name: of the nodes, which are one of a source layer.
    """
    one, zero = nodes.numbers(1), nodes.numbers(0)
    tokens = nodes.one("Add", [nodes.one("Cast", [last], f"{name}last", to=INT64), one], f"{name}tokens")
    capacity = nodes.one("Shape", [buffer], f"{name}capacity", start=2, end=3)
    step = nodes.one("Sub", [capacity, nodes.numbers(window - 1)], f"{name}step")
    over = nodes.one("Max", [nodes.one("Sub", [tokens, capacity], f"{name}beyond"), zero], f"{name}over")
    rounded = nodes.one("Add", [over, nodes.one("Sub", [step, one], f"{name}step_less_one")], f"{name}rounded")
    moves = nodes.one("Div", [rounded, step], f"{name}moves")
    held = nodes.one("Sub", [tokens, nodes.one("Mul", [moves, step], f"{name}gone")], f"{name}held")
    seqlens = nodes.one("Cast", [nodes.one("Sub", [held, one], f"{name}last_held")], f"{name}seqlens_k", to=INT32)
    most = nodes.one("ReduceMax", [held, zero], f"{name}most_held", keepdims=1)
    return Held(seqlens, nodes.one("Cast", [most], f"{name}total", to=INT32))


def query_positions(nodes: Nodes, last: ir.Value, queries: ir.Value, *, path: str) -> ir.Value:
    """[B, N] int64: positions of the last N tokens of each row.

    Args:
        last: [B] int32, that of the last one; queries: [B, N, channels]; path: of the nodes.
    """
    count, one = nodes.one("Shape", [queries], f"{path}query_count", start=1, end=2), nodes.numbers(1)
    wide = nodes.one("Cast", [last], f"{path}last_query", to=INT64)
    behind = nodes.one("Sub", [nodes.numbers(0), nodes.one("Sub", [count, one], f"{path}others")], f"{path}behind")
    ends = [nodes.one("Squeeze", [value], f"{path}{name}") for value, name in ((behind, "from"), (one, "to"))]
    places = nodes.one("Range", [*ends, nodes.constant(np.int64(1), "int64.scalar.1")], f"{path}places")
    return nodes.one("Add", [nodes.one("Unsqueeze", [wide, one], f"{path}last_row"), places], f"{path}positions")
