"""Which of the new tokens are real, and where GroupQueryAttention wants them.

A token whose column in attention_mask is 0 is padding: it has no position and nobody attends to it. GroupQueryAttention
knows padding on the right alone: row b's new tokens go into the cache behind those it has, real ones first. So the
real tokens of a row are moved to its front, in order, wherever the padding stands, and what a row gives is looked up
where they went. Nothing is moved where nothing is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.onnxruntime.nodes import Nodes

INT32 = ir.DataType.INT32.value


@dataclass(frozen=True)
class Tokens:
    """New tokens as attention reads them.

    Attributes:
        ids: [B, S] int64, real tokens first.
        seqlens: [B] int32, GroupQueryAttention's seqlens_k: positions of the cache filled after this step, less one.
        total: [1] int32, its total_sequence_length: columns of the mask.
        read: [B] int32, its query_seqlens: real tokens among the new ones; None where all caches are whole.
        last: [B, 1, 1] int64, place of each row's last real token in `ids`; -1, the end, where it has none.
        seen: [B, S] int64, the mask of the new tokens as it was given.
    """

    ids: ir.Value
    seqlens: ir.Value
    total: ir.Value
    read: ir.Value | None
    last: ir.Value
    seen: ir.Value


def real_tokens_first(nodes: Nodes, ids: ir.Value, mask: ir.Value, windowed: bool) -> Tokens:
    """Add the nodes that order new tokens and count them.

    A full-length cache holds a row's padding behind its real tokens until the next step overwrites it. A cache of a
    window alone has no room for padding: query_seqlens keeps it out.

    Args:
        nodes: of the graph.
        ids: [B, S] int64.
        mask: [B, T] int64, 0 or 1; its last S columns are those of the new tokens.
        windowed: some caches hold a window alone.
    """
    one = nodes.numbers(1)
    new, columns = (nodes.one("Shape", [value], name, start=1, end=2)
                    for value, name in ((ids, "new_tokens"), (mask, "total_length")))  # fmt: skip
    most = nodes.numbers(np.iinfo(np.int64).max)
    seen = nodes.one("Slice", [mask, nodes.one("Neg", [new], "first_new"), most, one], "seen")
    ordered = nodes.one("GatherElements", [ids, _order(nodes, seen, new)], "ordered_ids", axis=1)
    lengths, found = (nodes.one("ReduceSum", [value, one], name, keepdims=0)
                      for value, name in ((mask, "lengths"), (seen, "found")))  # fmt: skip
    last = nodes.one("Sub", [found, one], "last")
    if windowed:
        filled = nodes.one("Max", [lengths, one], "filled")  # a row without a token reads one of its padding
        read = nodes.one("Add", [found, nodes.one("Sub", [filled, lengths], "nothing")], "read")
    else:
        filled = nodes.one("Add", [lengths, nodes.one("Sub", [new, found], "padding")], "filled")
    seqlens = nodes.one("Sub", [filled, one], "last_filled")
    return Tokens(
        ids=ordered,
        seqlens=nodes.one("Cast", [seqlens], "seqlens_k", to=INT32),
        total=nodes.one("Cast", [columns], "total_sequence_length", to=INT32),
        read=nodes.one("Cast", [read], "query_seqlens", to=INT32) if windowed else None,
        last=nodes.one("Unsqueeze", [last, nodes.numbers(1, 2)], "last_index"),
        seen=seen,
    )


def _order(nodes: Nodes, seen: ir.Value, new: ir.Value) -> ir.Value:
    """[B, S]: places of a row's real tokens, in order, then those of its padding."""
    size = nodes.one("Squeeze", [new], "new_count")
    first, step = (nodes.constant(np.int64(number), f"int64.scalar.{number}") for number in (0, 1))
    places = nodes.one("Range", [first, size, step], "places")
    ahead = nodes.one("Mul", [seen, new], "ahead")  # keys of real tokens are below those of padding, and no two alike
    keys = nodes.one("Sub", [places, ahead], "keys")
    return nodes.many("TopK", [keys, new], ["sorted_keys", "order"], axis=1, largest=0, sorted=1)[1]
