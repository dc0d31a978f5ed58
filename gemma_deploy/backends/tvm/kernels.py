"""Products as loops of TVM: int8 codes are multiplied as they lie, and made floats in registers.

Two kinds of loops. `dots` is for a few rows: each sum runs along both rows, a vector at a time, so that memory is read
once and in order. `blocks` is for many rows: 8 x 32 sums stay in registers while the shared dimension passes by; rows
of codes are unpacked for all of them first, 32 at a time. Everything else of a graph is scheduled by schedules.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, te, topi

COLUMNS, ROWS = 32, 8  # sums that stay in registers
LANES = 64  # numbers of a row that are multiplied at a time: four vectors, so that none waits for the one before
CHUNK = 64  # sums that a thread takes at a time
OURS = "tirx.is_scheduled"  # TVM's own mark of a function whose loops stay as they are
FEW = 16  # rows from which on unpacking pays


@dataclass(frozen=True)
class Product:
    """[batch, m, k] x [batch, n, k], or [batch, k, n], -> [batch, m, n] float32.

    Args:
        shared: the second has one matrix for all of the batch; dtype: of its numbers; scaled: a third argument, [n]
            float32, multiplies columns of the result; transposed: the second is [batch, n, k].
    """

    batch: int
    m: int
    n: int
    k: int
    shared: bool
    dtype: str = "float32"
    scaled: bool = False
    transposed: bool = True

    def built(self) -> Any:
        """The loops, a `PrimFunc`."""
        made = dots(self) if self.transposed and min(self.m, self.n) < FEW else blocks(self)
        return made.without_attr("global_symbol").with_attr(OURS, True)


def dots(of: Product) -> Any:
    """Each sum on its own."""
    a, b, scales = _arguments(of)
    lanes = math.gcd(of.k, LANES)
    step, lane = te.reduce_axis((0, of.k // lanes), "step"), te.reduce_axis((0, lanes), "lane")

    def partial(x: Any, i: Any, j: Any, of_lane: Any) -> Any:
        at = step * lanes + of_lane
        return te.sum(a[x, i, at] * b[0 if of.shared else x, j, at].astype("float32"), axis=step)

    part = te.compute((of.batch, of.m, of.n, lanes), partial, "part")
    total = te.compute((of.batch, of.m, of.n), lambda x, i, j: te.sum(part[x, i, j, lane], axis=lane), "total")
    made = _scaled(of, total, scales)
    sch = s_tir.Schedule(te.create_prim_func([a, b, *scales, made]))
    rows = sch.fuse(*sch.get_loops(sch.get_sblock("out" if of.scaled else "total"))[:3])
    outer, inner = sch.split(rows, [None, math.gcd(of.batch * of.m * of.n, CHUNK)])
    sch.parallel(outer)
    if of.scaled:
        sch.compute_at(sch.get_sblock("total"), inner)
        sch.set_scope(sch.get_sblock("total"), 0, "local")
    block = sch.get_sblock("part")
    sch.compute_at(block, inner, preserve_unit_loops=True)
    sch.set_scope(block, 0, "local")
    *_, vector, steps = sch.get_loops(block)
    sch.reorder(steps, vector)
    sch.vectorize(vector)
    sch.decompose_reduction(block, steps)
    return sch.mod["main"]


def blocks(of: Product) -> Any:
    """A block of sums at a time."""
    a, b, scales = _arguments(of)
    rows = math.gcd(of.m, ROWS)
    columns, along = math.gcd(of.n, COLUMNS * ROWS // rows), te.reduce_axis((0, of.k), "along")
    if of.transposed:
        shape = (b.shape[0], of.n // columns, of.k, columns)
        packed = te.compute(shape, lambda x, jo, at, ji: b[x, jo * columns + ji, at].astype("float32"), "packed")

    def term(x: Any, i: Any, j: Any) -> Any:
        which = 0 if of.shared else x
        other = packed[which, j // columns, along, j % columns] if of.transposed else b[which, along, j]
        return te.sum(a[x, i, along] * other.astype("float32"), axis=along)

    total = te.compute((of.batch, of.m, of.n), term, "total")
    made = _scaled(of, total, scales)
    sch = s_tir.Schedule(te.create_prim_func([a, b, *scales, made]))
    sums = sch.get_sblock("total")
    if of.scaled:
        sch.set_scope(sums, 0, "local")
        last = sch.get_sblock("out")
    else:
        last = sch.cache_write(sums, 0, "local")
    x, i, j = sch.get_loops(last)
    above, row = sch.split(i, [None, rows])
    beside, vector = sch.split(j, [None, columns])
    sch.reorder(x, beside, above, row, vector)
    outer = sch.fuse(x, beside)
    sch.parallel(outer)
    sch.vectorize(vector)
    sch.unroll(row)
    sch.compute_at(sums, above, preserve_unit_loops=True)
    if of.transposed:
        unpacking = sch.get_sblock("packed")
        sch.compute_at(unpacking, outer, preserve_unit_loops=True)
        *_, along_row, column = sch.get_loops(unpacking)
        sch.reorder(column, along_row)
    *_, row, vector, steps = sch.get_loops(sums)
    sch.reorder(steps, row, vector)
    sch.vectorize(vector)
    sch.unroll(row)
    sch.decompose_reduction(sums, steps)
    return sch.mod["main"]


def softmax(rows: int, size: int) -> Any:
    """[rows, size] float32 -> shares of each row that add up to 1."""
    x = te.placeholder((rows, size), "float32", "x")
    lanes = math.gcd(size, LANES)

    def along(name: str, of: Any, reducer: Any) -> Any:
        """Of each row, a vector at a time."""
        step, lane = te.reduce_axis((0, size // lanes), "step"), te.reduce_axis((0, lanes), "lane")
        part = te.compute((rows, lanes), lambda i, j: reducer(of[i, step * lanes + j], axis=step), f"{name}_part")
        return te.compute((rows,), lambda i: reducer(part[i, lane], axis=lane), name)

    most = along("most", x, te.max)
    less = te.compute((rows, size), lambda i, j: x[i, j] - most[i], "less")
    raised = topi.fast_exp(less)
    whole = along("whole", raised, te.sum)
    out = te.compute((rows, size), lambda i, j: raised[i, j] / whole[i], "out")
    sch = s_tir.Schedule(te.create_prim_func([x, out]))
    row, column = sch.get_loops(sch.get_sblock("out"))
    sch.parallel(row)
    sch.vectorize(sch.split(column, [None, lanes])[1])
    sch.compute_inline(sch.get_sblock("less"))
    for name in ("whole", "whole_part", raised.op.name, "most", "most_part"):
        block = sch.get_sblock(name)
        sch.compute_at(block, row, preserve_unit_loops=True)
        if name == raised.op.name:
            sch.vectorize(sch.split(sch.get_loops(block)[-1], [None, lanes])[1])
        if name.endswith("_part"):
            *_, vector, steps = sch.get_loops(block)
            sch.reorder(steps, vector)
            sch.vectorize(vector)
            sch.decompose_reduction(block, steps)
    return sch.mod["main"].without_attr("global_symbol").with_attr(OURS, True)


def _arguments(of: Product) -> tuple[Any, Any, list[Any]]:
    matrices = 1 if of.shared else of.batch
    a = te.placeholder((of.batch, of.m, of.k), "float32", "a")
    lies = (matrices, of.n, of.k) if of.transposed else (matrices, of.k, of.n)
    return a, te.placeholder(lies, of.dtype, "b"), [te.placeholder((of.n,), "float32", "s")] if of.scaled else []


def _scaled(of: Product, total: Any, scales: list[Any]) -> Any:
    if not of.scaled:
        return total
    return te.compute((of.batch, of.m, of.n), lambda x, i, j: total[x, i, j] * scales[0][j], "out")
