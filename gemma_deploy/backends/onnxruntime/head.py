"""The LM head: the table's rows times what leaves the last norm.

whole: every row by the block kernel. screened: the high four bits of every code first, which is half of what must be
read; then the rows of the likeliest tokens once more, exactly, with the codes that the embedding reads. All other
tokens keep what the high bits gave, so that a distribution is rougher where it is small, and its largest logits are
those of float32 products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.onnxruntime.linears import Matrix
from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.names import HEAD, MICROSOFT

if TYPE_CHECKING:
    from gemma_deploy.backends.onnxruntime.weights import Weights

# Bytes of the table in one product. A session maps a matrix while it packs it, so that the largest one decides the
# peak of loading; several cost 0.1 ms a token.
HEAD_BYTES = 32 << 20
LOW_BITS, HIGH_HALF = 4, 0xF0
MEAN_REST = 7.5  # of the low half of a code, 0 to 15


def whole_head(nodes: Nodes, weights: Weights, module: str, *, block: int, normed: ir.Value) -> ir.Value:
    """[B,S,H] -> logits [B,S,V] of all rows of a table."""
    whole = Matrix(weights, [module], module, block=block)
    shares = [
        Matrix(weights, [module], f"{HEAD}.{k}", block=block, part=part).product(nodes, normed, f"{HEAD}.{k}.out")
        for k, part in enumerate(parts_of(whole.rows, int(whole.columns * (whole.bits / 8 or 4))))
    ]
    return _joined(nodes, shares, f"{HEAD}.out")


def screened_head(
    nodes: Nodes, weights: Weights, module: str, *, block: int, normed: ir.Value, candidates: int
) -> ir.Value:
    """The same, of the high halves of 8-bit codes, but for the likeliest tokens.

    Args:
        candidates: tokens whose rows are multiplied whole.
    """
    whole = Matrix(weights, [module], module, block=block)
    rough = _rough(nodes, weights, whole, normed)
    count = nodes.numbers(min(candidates, whole.rows))
    _, likeliest = nodes.many("TopK", [rough, count], [f"{HEAD}.top", f"{HEAD}.likeliest"], axis=-1, sorted=0)
    rows = whole.chosen_rows(nodes, likeliest, f"{HEAD}.rows")
    column = nodes.one("Unsqueeze", [normed, nodes.numbers(3)], f"{HEAD}.column")
    products = nodes.one("MatMul", [rows, column], f"{HEAD}.products")
    fine = nodes.one("Squeeze", [products, nodes.numbers(3)], f"{HEAD}.fine")
    return nodes.one("ScatterElements", [rough, likeliest, fine], f"{HEAD}.out", axis=2)


def _rough(nodes: Nodes, weights: Weights, whole: Matrix, normed: ir.Value) -> ir.Value:
    """Logits [B,S,V] of codes whose low half is taken for its mean."""
    blocks, module, shares = whole.columns // whole.block, whole.name, []
    for k, part in enumerate(parts_of(whole.rows, whole.columns // 2)):
        name = f"{HEAD}.{k}"
        share = Matrix(weights, [module], name, block=whole.block, part=part)
        codes = weights.view(
            whole.codes, f"{name}.codes", (share.rows, share.columns), dtype=ir.DataType.UINT8, part=part
        )
        scales = weights.block_scales(whole.scales, name, blocks, part=part)
        halves = _high_halves(nodes, codes, name, (share.rows, blocks, whole.block // 2))
        steps = nodes.one("Mul", [scales, nodes.scalar(1 << LOW_BITS)], f"{name}.high_scale")
        shares.append(share.block_product(nodes, normed, halves, scales=steps, bits=LOW_BITS, out=f"{name}.out"))
    high = _joined(nodes, shares, f"{HEAD}.high")
    scales, groups = weights.view(whole.scales, f"{module}.scale"), 1 if whole.per_row else blocks
    apart = nodes.one("Reshape", [normed, nodes.numbers(0, 0, groups, -1)], f"{HEAD}.groups")
    sums = nodes.one("ReduceSum", [apart, nodes.numbers(3)], f"{HEAD}.sums", keepdims=0)
    rest = nodes.one("Mul", [sums, nodes.scalar(MEAN_REST)], f"{HEAD}.mean_rest")
    if whole.per_row:
        shift = nodes.one("Mul", [rest, scales], f"{HEAD}.shift")
    else:
        shift = nodes.one("FusedMatMul", [rest, scales], f"{HEAD}.shift", domain=MICROSOFT, transB=1)
    return nodes.one("Add", [high, shift], f"{HEAD}.rough")


def _joined(nodes: Nodes, shares: list[ir.Value], name: str) -> ir.Value:
    return nodes.one("Concat", shares, name, axis=-1) if len(shares) > 1 else shares[0]


def _high_halves(nodes: Nodes, codes: ir.Value, name: str, shape: tuple[int, int, int]) -> ir.Value:
    """Codes uint8 [rows, columns] -> their high halves, two in a byte, the first in the low half.

    Made when a session is opened, so that the file has every code once.
    """
    axes, step, most = nodes.numbers(1), nodes.numbers(2), nodes.numbers(np.iinfo(np.int64).max)
    even, odd = (
        nodes.one("Slice", [codes, nodes.numbers(first), most, axes, step], f"{name}.{which}")
        for first, which in enumerate(("even", "odd"))
    )
    shift = nodes.constant(np.uint8(LOW_BITS), f"uint8.{LOW_BITS}")
    mask = nodes.constant(np.uint8(HIGH_HALF), f"uint8.{HIGH_HALF}")
    first = nodes.one("BitShift", [even, shift], f"{name}.first", direction="RIGHT")
    second = nodes.one("BitwiseAnd", [odd, mask], f"{name}.second")
    pairs = nodes.one("BitwiseOr", [first, second], f"{name}.pairs")
    return nodes.one("Reshape", [pairs, nodes.numbers(*shape)], f"{name}.high_halves")


def parts_of(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the rows that are multiplied together."""
    step = max(1, HEAD_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
