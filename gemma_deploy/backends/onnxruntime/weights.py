"""Initializers: views of params.safetensors, and what is made of them when a session is opened.

The file has one tensor per matrix, under its Hugging Face name. Tensors that lie behind one another are one initializer
here (q, k and v; gate and up), so that one kernel reads them and nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.errors import ExportError
from gemma_deploy.graph.external import Row, onnx_type

Part = tuple[int, int] | None


class Weights:
    """The parameter file as initializers of a graph.

    Args:
        top: the graph that gets them; rows: of the file; location: its name beside the graph.

    Attributes:
        computed: in which gains and rotary tables are wanted; the file has them in float32.
        norm_offset: what a norm's gain is more than its weight.
    """

    def __init__(self, top: Nodes, rows: Iterable[Row], location: str) -> None:
        self.top, self.location = top, location
        self.rows = {row.name: row for row in rows}
        self.used: set[str] = set()
        self.computed, self.norm_offset = ir.DataType.FLOAT, 1.0
        self._made: dict[str, ir.Value] = {}

    def has(self, name: str) -> bool:
        """Whether the file holds it."""
        return name in self.rows

    def shape(self, names: Sequence[str], part: Part = None) -> tuple[int, ...]:
        """Of matrices or vectors of one width, one below the other; or of some rows [start, stop) of one."""
        shapes = [self._row(name).shape for name in names]
        rows = sum(shape[0] for shape in shapes) if part is None else part[1] - part[0]
        return (rows, *shapes[0][1:])

    def dtype(self, name: str) -> str:
        """The dtype of a tensor in the parameter file."""
        return self._row(name).dtype

    def view(
        self,
        names: Sequence[str],
        name: str,
        shape: Sequence[int] | None = None,
        *,
        dtype: ir.DataType | None = None,
        part: Part = None,
    ) -> ir.Value:
        """Tensors that lie behind one another, as one initializer.

        Args:
            name: of the initializer; shape, dtype: in which the same bytes are read, as they are by default.
            part: rows [start, stop) of a single tensor.

        Raises:
            ExportError: there is something between them.
        """
        if name in self.top.initializers:
            return self.top.initializers[name]
        rows = [self._row(one) for one in names]
        for before, after in pairwise(rows):
            if before.offset + before.nbytes != after.offset or before.dtype != after.dtype:
                raise ExportError(
                    f"{after.name} does not lie behind {before.name}",
                    where=self.location,
                    next_step="this is a bug: report it",
                )
        self.used.update(names)
        read_as, dims = dtype or onnx_type(rows[0].dtype), ir.Shape(shape or self.shape(names, part))
        offset, nbytes = rows[0].offset, sum(row.nbytes for row in rows)
        if part is not None:
            row_bytes = nbytes // rows[0].shape[0]
            offset, nbytes = offset + part[0] * row_bytes, (part[1] - part[0]) * row_bytes
        tensor = ir.ExternalTensor(self.location, offset, nbytes, read_as, shape=dims, name=name)
        return self.top.add(ir.Value(name=name, const_value=tensor))

    def gain(self, norm: str) -> ir.Value:
        """What a norm multiplies by: its weight and the generation's offset."""
        weight = self.view([f"{norm}.weight"], f"{norm}.weight")

        def added(name: str) -> ir.Value:
            exact = self.computed == ir.DataType.FLOAT
            gain = weight
            if self.norm_offset:
                offset = self.top.scalar(self.norm_offset)
                gain = self.top.one("Add", [weight, offset], name if exact else f"{name}.wide")
            return gain if exact else self.top.one("Cast", [gain], name, to=self.computed.value)

        return self._once(f"{norm}.gain", added)

    def ones(self, size: int) -> ir.Value:
        """What a norm without a weight multiplies by."""
        name = f"ones.{size}"
        return self.as_computed(self.top.constant(np.ones(size, np.float32), f"float32.{name}"), name)

    def computed_view(self, name: str) -> ir.Value:
        """A float32 tensor of the file, in the type that is computed in."""
        return self.as_computed(self.view([name], name), name)

    def scalar(self, value: float) -> ir.Value:
        """A number in the type that is computed in."""
        made = self.top.scalar(value)
        return self.as_computed(made, str(made.name))

    def scaled(self, name: str, factor: float) -> ir.Value:
        """A vector times a number, in the type that is computed in."""
        vector = self.view([name], name)
        product = self._once(
            f"{name}.scaled", lambda made: self.top.one("Mul", [vector, self.top.scalar(factor)], made)
        )
        return self.as_computed(product, f"{name}.scaled")

    def rotary(self, kind: str, table: str) -> ir.Value:
        """[positions, head_dim / 2] "cos" or "sin" of a kind of layer."""
        name = f"rotary.{kind}.{table}"
        return self.as_computed(self.view([f"model.rotary_emb.{kind}.{table}"], name), name)

    def block_scales(self, names: Sequence[str], name: str, blocks: int, *, part: Part = None) -> ir.Value:
        """Scales [rows, blocks] of matrices whose scales are [rows] or [rows, groups]."""
        shape = self.shape(names, part)
        scales = self.view(names, f"{name}.scale", part=part)
        if len(shape) == 2:
            assert shape[1] == blocks, (name, shape, blocks)
            return scales

        def repeated(made: str) -> ir.Value:
            column = self.top.one("Unsqueeze", [scales, self.top.numbers(1)], f"{made}.column")
            return self.top.one("Expand", [column, self.top.numbers(shape[0], blocks)], made)

        return self._once(f"{name}.block_scale", repeated)

    def as_computed(self, value: ir.Value, name: str) -> ir.Value:
        """A float32 value in the type that is computed in; `name` is that of the tensor."""
        if self.computed == ir.DataType.FLOAT:
            return value
        return self._once(f"{name}.half", lambda made: self.top.one("Cast", [value], made, to=self.computed.value))

    def unused(self) -> list[str]:
        """Tensors of the file that no initializer shows."""
        return [name for name in self.rows if name not in self.used]

    def _row(self, name: str) -> Row:
        if name not in self.rows:
            raise ExportError(f"{name} is not in {self.location}", next_step="this is a bug: report it")
        return self.rows[name]

    def _once(self, name: str, make: Callable[[str], ir.Value]) -> ir.Value:
        if name not in self._made:
            self._made[name] = make(name)
        return self._made[name]


def largest_block(columns: int, most: int) -> int:
    """The largest power of two up to `most` of which `columns` is a multiple; `schemes.block_problems` went before."""
    block = most
    while columns % block:
        block //= 2
    return block
