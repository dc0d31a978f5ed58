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
        wanted: [B, N, 1] int64, places in `ids` of the tokens whose logits the graph gives: each row's last real one,
            or all of them in the order in which they were given. Where a row has no real token, one of its padding.
        last: [B] int32, seqlens_k of a step that has each row's last real token alone and writes nothing.
    """

    ids: ir.Value
    seqlens: ir.Value
    total: ir.Value
    read: ir.Value | None
    wanted: ir.Value
    last: ir.Value


def real_tokens_first(
    nodes: Nodes, ids: ir.Value, mask: ir.Value, *, windowed: bool, every: bool, sharing: bool = False
) -> Tokens:
    """Add the nodes that order new tokens and count them.

    A full-length cache holds a row's padding behind its real tokens until the next step overwrites it. A cache of a
    window alone has no room for padding: query_seqlens keeps it out.

    Args:
        nodes: of the graph.
        ids: [B, S] int64.
        mask: [B, T] int64, 0 or 1; its last S columns are those of the new tokens.
        windowed: some caches hold a window alone.
        every: logits of all new tokens are wanted, not of the last ones alone.
        sharing: some layers read the caches of others, and have the last tokens alone where `every` is not set.
    """
    one = nodes.numbers(1)
    new, columns = (nodes.one("Shape", [value], name, start=1, end=2)
                    for value, name in ((ids, "new_tokens"), (mask, "total_length")))  # fmt: skip
    most = nodes.numbers(np.iinfo(np.int64).max)
    seen = nodes.one("Slice", [mask, nodes.one("Neg", [new], "first_new"), most, one], "seen")
    ordered = nodes.one("GatherElements", [ids, _order(nodes, seen, new)], "ordered_ids", axis=1)
    lengths, marked = (nodes.one("ReduceSum", [value, one], name, keepdims=0)
                       for value, name in ((mask, "lengths"), (seen, "marked")))  # fmt: skip
    found = _real(nodes, marked, new)
    if windowed:
        filled = nodes.one("Max", [lengths, one], "filled")  # a row without a token reads one of its padding
        read = nodes.one("Add", [found, nodes.one("Sub", [filled, lengths], "nothing")], "read")
    else:
        filled = nodes.one("Add", [lengths, nodes.one("Sub", [new, found], "padding")], "filled")
    seqlens = nodes.one("Sub", [filled, one], "last_filled")
    filled_places = last = nodes.one("Cast", [seqlens], "seqlens_k", to=INT32)
    if sharing and not every:
        real = nodes.one("Sub", [nodes.one("Max", [lengths, one], "real_or_one"), one], "last_real")
        last = nodes.one("Cast", [real], "last_seqlens_k", to=INT32)
    return Tokens(
        ids=ordered,
        seqlens=filled_places,
        last=last,
        total=nodes.one("Cast", [columns], "total_sequence_length", to=INT32),
        read=nodes.one("Cast", [read], "query_seqlens", to=INT32) if windowed else None,
        wanted=_every_place(nodes, seen) if every else _last_place(nodes, read if windowed else found),
    )


def _real(nodes: Nodes, marked: ir.Value, new: ir.Value) -> ir.Value:
    """[B]: real tokens among a row's new ones.

    genai's Engine writes the ones of a row side by side, so that at a step of one token a row the last column is 0 for
    all but the longest rows: where it is 1 for one row, the tokens of all of them are real.
    """
    any_row = nodes.one("ReduceMax", [marked, nodes.numbers(0)], "any_row", keepdims=1)
    one_token = nodes.one("Sub", [nodes.numbers(2), new], "one_token")  # 1 for one token a row, else 0 or less
    return nodes.one("Max", [marked, nodes.one("Min", [any_row, one_token], "at_least")], "found")


def _last_place(nodes: Nodes, found: ir.Value) -> ir.Value:
    """[B, 1, 1]: real tokens lie in front, so that their number less one is the place of the last."""
    last = nodes.one("Sub", [found, nodes.numbers(1)], "last")
    return nodes.one("Unsqueeze", [last, nodes.numbers(1, 2)], "last_index")


def _every_place(nodes: Nodes, seen: ir.Value) -> ir.Value:
    """[B, S, 1]: a token goes behind the real ones before it; padding is told what the last of those gives.

    What stands before the first real token is told what that gives: GroupQueryAttention computes nothing for the places
    behind a row's real tokens where query_seqlens keeps them out of the cache.
    """
    count = nodes.one("CumSum", [seen, nodes.constant(np.int64(1), "int64.scalar.1")], "count_so_far")
    place = nodes.one("Max", [nodes.one("Sub", [count, nodes.numbers(1)], "behind"), nodes.numbers(0)], "place")
    return nodes.one("Unsqueeze", [place, nodes.numbers(2)], "places_of")


def _order(nodes: Nodes, seen: ir.Value, new: ir.Value) -> ir.Value:
    """[B, S]: places of a row's real tokens, in order, then those of its padding."""
    size = nodes.one("Squeeze", [new], "new_count")
    first, step = (nodes.constant(np.int64(number), f"int64.scalar.{number}") for number in (0, 1))
    places = nodes.one("Range", [first, size, step], "places")
    ahead = nodes.one("Mul", [seen, new], "ahead")  # keys of real tokens are below those of padding, and no two alike
    keys = nodes.one("Sub", [places, ahead], "keys")
    return nodes.many("TopK", [keys, new], ["sorted_keys", "order"], axis=1, largest=0, sorted=1)[1]
