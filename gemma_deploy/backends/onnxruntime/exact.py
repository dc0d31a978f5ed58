"""An artifact's own graph, taken apart for proof: every position, exact arithmetic.

The nodes are the graph's own, and the weights stay where they lie; what `exact` puts in the place of a kernel computes
what the codes and scales stand for, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.onnxruntime.cache_codes import float_caches
from gemma_deploy.backends.onnxruntime.head import parts_of
from gemma_deploy.names import MICROSOFT

CHOSEN = ".chosen"  # ends the name of what GatherND picks


def every_position(model: ir.Model) -> None:
    """Let nodes behind the choice of the last token see all of them. In place."""
    graph = model.graph
    for node in [node for node in graph if str(node.outputs[0].name).endswith(CHOSEN)]:
        whole = node.inputs[0]
        assert whole is not None
        ir.convenience.replace_all_uses_with([node.outputs[0]], [whole])
        graph.remove(node, safe=True)
    for value in graph.outputs:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape(("batch", "sequence", value.shape[2]))


def exact(model: ir.Model) -> None:
    """Put float32 arithmetic on dequantized weights in the place of every kernel that rounds. In place."""
    graph = model.graph
    widen(model)
    float_caches(model)
    rounding = [node for node in graph.all_nodes() if node.op_type in _EXACT]
    for node in [node for node in graph if node.op_type == "ScatterElements"]:
        _whole_head(graph, node)
    drop_unread(graph)  # what screened the head
    for node in rounding:
        if node.graph is graph:
            _EXACT[node.op_type](graph, node)
        elif isinstance(node.graph, ir.Graph):  # the body of a loop over experts
            _IN_LOOPS.get(node.op_type, _EXACT[node.op_type])(node.graph, node)
    drop_unread(graph)


def widen(model: ir.Model) -> None:
    """Compute a bfloat16 graph in float32, on the weights it has. In place; nothing where all is float32 already."""
    graph, bfloat16, float32 = model.graph, ir.DataType.BFLOAT16, ir.TensorType(ir.DataType.FLOAT)
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == bfloat16:
            value.type = float32
            if value.const_value is not None:  # an adapter's matrix, which has no values
                value.const_value = ir.tensor(np.zeros(value.const_value.shape.numpy(), np.float32), name=value.name)
    for node in graph.all_nodes():
        if node.op_type == "Cast" and node.attributes["to"].as_int() == bfloat16.value:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
        for value in node.outputs:
            if value.dtype == bfloat16:
                value.type = float32
    first = next(iter(graph))
    for value in [value for value in graph.initializers.values() if value.dtype == bfloat16]:
        users = list(value.uses())
        inside = [node for node, _ in users if node.graph is not graph]
        if inside:
            _widen_chosen(inside)
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
        cast.outputs[0].name = f"{value.name}.float32"
        graph.insert_before(first, cast)
        for node, index in users:
            node.replace_input_with(index, cast.outputs[0])


def _widen_chosen(gathers: list[ir.Node]) -> None:
    """Cast what loops gather of the matrices of all experts, and not these, which no memory would hold."""
    for gather in gathers:
        chosen, body = gather.outputs[0], gather.graph
        assert isinstance(body, ir.Graph)
        cast = ir.node("Cast", [chosen], {"to": ir.DataType.FLOAT.value})
        cast.outputs[0].name = f"{chosen.name}.float32"
        readers = [(node, index) for node, index in chosen.uses() if node is not cast]
        body.insert_after(gather, cast)
        for node, index in readers:
            node.replace_input_with(index, cast.outputs[0])


class Before:
    """Adds nodes in front of one and lets its readers read the last of them."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.name = graph, node, str(node.outputs[0].name)

    def add(self, op_type: str, inputs: list[ir.Value], what: str, **attributes: Any) -> ir.Value:
        """The first output of a new node, named after the old one's and `what`."""
        made = ir.node(op_type, inputs, attributes, domain=MICROSOFT if op_type == "FusedMatMul" else "")
        made.outputs[0].name = f"{self.name}.{what}"
        self.graph.insert_before(self.node, made)
        return made.outputs[0]

    def constant(self, array: np.ndarray, what: str) -> ir.Value:
        """An initializer, named likewise."""
        name = f"{self.name}.{what}"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        self.graph.register_initializer(value)
        return value

    def replace(self, value: ir.Value) -> None:
        """Let the readers of the old node read a float32 value; the node goes."""
        old = self.node.outputs[0]
        value.name, value.shape, value.type = old.name, old.shape, ir.TensorType(ir.DataType.FLOAT)
        old.name = None
        ir.convenience.replace_all_uses_with([old], [value], replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)

    def viewed(
        self, codes: ir.Value, dtype: ir.DataType, shape: tuple[int, ...], *, part: tuple[int, int] | None = None
    ) -> ir.Value:
        """The bytes of an initializer read in another form, or those of rows [start, stop)."""
        stored = codes.const_value
        assert isinstance(stored, ir.ExternalTensor), codes.name
        first, last = part or (0, _sizes(codes)[0])
        name, dims = f"{self.name}.{codes.name}.{first}", ir.Shape(shape)
        row = (stored.length or 0) // _sizes(codes)[0]
        offset, length = (stored.offset or 0) + first * row, (last - first) * row
        tensor = ir.ExternalTensor(
            stored.location, offset, length, dtype, shape=dims, name=name, base_dir=stored.base_dir
        )
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=dims)
        self.graph.register_initializer(value)
        return value

    def dequantized(
        self,
        codes: ir.Value,
        scales: ir.Value,
        bits: int,
        *,
        shape: tuple[int, int],
        after: ir.Value,
        part: tuple[int, int] | None = None,
    ) -> ir.Value:
        """Codes [out, in] times their scales [out] or [out, groups]; `part`, those of some rows."""
        scales = _repeated(scales)
        dtype = ir.DataType[f"UINT{bits}"]
        viewed = self.viewed(codes, dtype, shape, part=part)
        if part is not None:
            scales = self.viewed(scales, ir.DataType.FLOAT, (shape[0], *_sizes(scales)[1:]), part=part)
        groups = _sizes(scales)
        per_row = len(groups) == 1
        zero = np.full(groups, 1 << (bits - 1), np.uint8).astype(dtype.numpy())
        attributes = {"axis": 0} if per_row else {"axis": 1, "block_size": shape[1] // groups[1]}
        at = "" if part is None else f".{part[0]}"
        inputs = [viewed, self.waiting(scales, after, at), self.constant(zero, f"zero_point{at}")]
        return self.add("DequantizeLinear", inputs, f"w{at}", **attributes)

    def transposed(self, codes: ir.Value, scales: ir.Value, after: ir.Value) -> ir.Value:
        """Signed codes [in, out] times their scales [out]."""
        return self.add("DequantizeLinear", [codes, self.waiting(scales, after)], "w", axis=1)

    def waiting(self, scales: ir.Value, after: ir.Value, at: str = "") -> ir.Value:
        """The scales and a zero that is made from the shape of `after`.

        Without it ONNX Runtime dequantizes all matrices first and holds them (real 270M, decode: 645 MiB at the peak,
        291 with it).
        """
        size = self.add("Shape", [after], f"size{at}", start=0, end=1)
        nothing = self.add("Sub", [size, size], f"nothing{at}")
        zero = self.add("Cast", [nothing], f"zero{at}", to=ir.DataType.FLOAT.value)
        return self.add("Add", [scales, zero], f"waiting{at}")

    def product(self, x: ir.Value, matrix: ir.Value, transposed: bool = False) -> None:
        """The node becomes a product with a matrix [out, in], or `transposed`, [in, out]."""
        made = self.add("FusedMatMul", [x, matrix], "exact", transB=int(not transposed))
        self.replace(made)


def _repeated(scales: ir.Value) -> ir.Value:
    """Scales [out] where they were repeated for every block of a row."""
    node = scales.producer()
    if node is None or node.op_type != "Expand":
        return scales
    return _input(_maker(_input(node, 0)), 0)


def _input(node: ir.Node, index: int) -> ir.Value:
    """An input that every node of its kind has."""
    value = node.inputs[index]
    assert value is not None, node.name
    return value


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, value.name
    return node


def _sizes(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None, value.name
    return tuple(int(size) for size in value.shape.numpy())


def _block_product(graph: ir.Graph, node: ir.Node) -> None:
    x, codes, scales = (_input(node, index) for index in range(3))
    here, size = Before(graph, node), node.attributes
    shape = (size["N"].as_int(), size["K"].as_int())
    here.product(x, here.dequantized(codes, scales, size["bits"].as_int(), shape=shape, after=x))


def _integer_product(graph: ir.Graph, node: ir.Node) -> None:
    """Its first input is no code any more: `_not_rounded` went before it, and the step is gone with the rounding."""
    x, codes, scales = _input(node, 0), _input(node, 1), _input(node, 3)
    here = Before(graph, node)
    here.product(x, here.transposed(codes, scales, x), transposed=True)


def _expert_product(graph: ir.Graph, node: ir.Node) -> None:
    """As `_integer_product`, of codes [..., in, out] that were chosen in a loop, and their scales, of any shape."""
    x, codes, scales = _input(node, 0), _input(node, 1), _input(node, 3)
    here = Before(graph, node)
    wide = here.add("Cast", [codes], "wide", to=ir.DataType.FLOAT.value)
    if len(node.inputs) > 5:  # a zero point
        zero = here.add("Cast", [_input(node, 5)], "zero", to=ir.DataType.FLOAT.value)
        wide = here.add("Sub", [wide, zero], "signed")
    here.replace(here.add("MatMul", [x, here.add("Mul", [wide, scales], "w")], "exact"))


def _not_rounded(graph: ir.Graph, node: ir.Node) -> None:
    here = Before(graph, node)
    here.replace(here.add("Identity", [_input(node, 0)], "exact"))


def _whole_head(graph: ir.Graph, node: ir.Node) -> None:
    """All rows of the table by float32 products, in the parts in which the graph has them."""
    rows, column = _maker(_input(_maker(_input(node, 2)), 0)).inputs
    assert rows is not None
    assert column is not None
    gathered, x = _maker(rows), _input(_maker(column), 0)
    codes, scales = _input(gathered, 0), _repeated(_input(gathered, 2))
    columns, here, shares = _sizes(codes)[1], Before(graph, node), []
    for part in parts_of(_sizes(codes)[0], columns):
        weights = here.dequantized(codes, scales, 8, shape=(part[1] - part[0], columns), after=x, part=part)
        shares.append(here.add("FusedMatMul", [x, weights], f"exact.{part[0]}", transB=1))
    here.replace(here.add("Concat", shares, "exact", axis=-1))


def _both_halves(here: Before, codes: ir.Value, width: int) -> ir.Value:
    """Pairs of 4-bit codes as float32 [B, S, width / 2], the first of a pair in the low half -> [B, S, width]."""
    sixteen, last = here.constant(np.array(16.0, np.float32), "sixteen"), here.constant(np.array([3]), "last")
    high = here.add("Floor", [here.add("Div", [codes, sixteen], "shifted")], "high")
    low = here.add("Sub", [codes, here.add("Mul", [high, sixteen], "upper")], "low")
    apart = [here.add("Unsqueeze", [half, last], f"{name}_column") for half, name in ((low, "low"), (high, "high"))]
    pairs = here.add("Concat", apart, "pairs", axis=3)
    return here.add("Reshape", [pairs, here.constant(np.array([0, 0, width]), "codes_of_row")], "halves")


def _rows(graph: ir.Graph, node: ir.Node) -> None:
    """Rows of a table: codes less the middle of their range, times the scales of their groups."""
    table, ids, bits = _input(node, 0), _input(node, 1), node.attributes["bits"].as_int()
    here, scales = Before(graph, node), _repeated(_input(node, 2))
    codes = here.add("Cast", [here.add("Gather", [table, ids], "rows", axis=0)], "wide", to=ir.DataType.FLOAT.value)
    groups, width = (*_sizes(scales), 1)[1], _sizes(table)[1] * 8 // bits
    if bits == 4:
        codes = _both_halves(here, codes, width)
    signed = here.add("Sub", [codes, here.constant(np.array(2.0 ** (bits - 1), np.float32), "zero")], "signed")
    apart = here.add("Reshape", [signed, here.constant(np.array([0, 0, groups, width // groups]), "split")], "groups")
    own = here.add("Gather", [scales, ids], "scales", axis=0)
    column = here.add("Reshape", [own, here.constant(np.array([0, 0, groups, 1]), "column")], "scale_column")
    product = here.add("Mul", [apart, column], "product")
    here.replace(here.add("Reshape", [product, here.constant(np.array([0, 0, width]), "join")], "exact"))


_EXACT: dict[str, Callable[[ir.Graph, ir.Node], None]] = {
    "QuantizeLinear": _not_rounded,
    "DequantizeLinear": _not_rounded,
    "MatMulNBits": _block_product,
    "MatMulIntegerToFloat": _integer_product,
    "GatherBlockQuantized": _rows,
}


_IN_LOOPS = {"MatMulIntegerToFloat": _expert_product}


def drop_unread(graph: ir.Graph) -> None:
    """Nodes and initializers that nobody reads any more."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if all(not value.uses() and value not in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            graph.initializers.pop(name)
            if value in graph.inputs:  # one that a caller may replace
                graph.inputs.remove(value)
