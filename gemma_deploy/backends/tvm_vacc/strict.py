"""Rewrites a graph so that ONNX Runtime computes it to the letter. Runs at load, before a `strict` session is opened.

Three passes over onnx_ir, all in place and weightless. None changes a number that the ONNX standard defines, except the
order of a sum inside `share_transposes`.

1. functions are inlined: each Vastai operator becomes its body;
2. `share_transposes`: a transposed weight is not written to memory (decode 3.5 times faster, a third less memory);
3. `make_rounding_explicit`: what a float16 operator returns is a float16 number, also on a CPU (see session.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from gemma_deploy.errors import DeployError
from gemma_deploy.names import MICROSOFT

# float16 operators with a CPU kernel of their own in ORT 1.32 that move or select values: no rounding, no hidden cast.
MOVES_FLOAT16 = frozenset(
    {
        "Cast", "Concat", "Constant", "ConstantOfShape", "DequantizeLinear", "Expand", "Flatten", "Gather",
        "GatherElements", "GatherND", "Identity", "Reshape", "ScatterElements", "ScatterND", "Shape", "Slice", "Split",
        "Squeeze", "Transpose", "Unsqueeze",
    }
)  # fmt: skip

# Which input an operator's result has the type of; the first where it is not named here.
LIKE = {"DequantizeLinear": 1, "Where": 1, "CastLike": 1, "OneHot": 2}


def lower(model: ir.Model) -> ir.Model:
    """Replace what ONNX Runtime has no exact kernel for: all passes, in order, in place."""
    if model.functions:
        model = InlinePass()(model).model
        complete_dtypes(model)
    share_transposes(model)
    make_rounding_explicit(model)
    return model


def complete_dtypes(model: ir.Model) -> None:
    """Give the values of inlined bodies their element types. In place."""
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is not None:
                continue
            if node.op_type == "Cast":
                value.dtype = ir.DataType(node.attributes["to"].as_int())
            elif node.op_type == "Constant":
                value.dtype = node.attributes["value"].as_tensor().dtype
            elif node.op_type == "Equal":
                value.dtype = ir.DataType.BOOL
            elif node.op_type == "Shape":
                value.dtype = ir.DataType.INT64
            else:
                value.type = _type_of(node.inputs[LIKE.get(node.op_type, 0)])


def share_transposes(model: ir.Model) -> int:
    """MatMul(x, Transpose(w)) -> FusedMatMul(x, w, transB=1). In place; returns the count."""
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type != "MatMul" or node.domain:
            continue
        x, weight = node.inputs
        transpose = _made_by(weight, "Transpose")
        if transpose is None or list(transpose.attributes["perm"].as_ints()) != [1, 0]:
            continue
        _replace(graph, node, "FusedMatMul", [x, transpose.inputs[0]], {"transB": 1}, domain=MICROSOFT)
        count += 1
        if not transpose.outputs[0].uses() and not transpose.outputs[0].is_graph_output():
            graph.remove(transpose, safe=True)
    if count:
        graph.opset_imports.setdefault(MICROSOFT, 1)
    return count


def make_rounding_explicit(model: ir.Model) -> int:
    """Compute float16 operators in float32 between casts that ORT does not drop. In place; returns the count.

    A CPU does the same with casts of its own, but only at the ends of a chain. Written out, each operator's output is
    rounded to float16 once, like on hardware that stores float16.

    Raises:
        DeployError: an operator with a subgraph.
    """
    graph, count = model.graph, 0
    widened: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise DeployError(
                f"a strict session cannot run operators with subgraphs: {node.name} ({node.op_type})",
                next_step="run it without --strict",
            )
        touched = [value for value in (*node.inputs, *node.outputs) if value is not None]
        if node.op_type in MOVES_FLOAT16 or not any(value.dtype == ir.DataType.FLOAT16 for value in touched):
            continue
        inputs = [_widened(graph, node, value, widened) for value in node.inputs]
        attributes = {name: attribute for name, attribute in node.attributes.items()}
        narrow = [value.dtype == ir.DataType.FLOAT16 for value in node.outputs]
        _replace(graph, node, node.op_type, inputs, attributes, domain=node.domain, narrow=narrow)
        count += 1
    return count


def _widened(
    graph: ir.Graph, before: ir.Node, value: ir.Value | None, widened: dict[ir.Value, ir.Value]
) -> ir.Value | None:
    """The float32 form of a float16 value, made once and placed before its first user."""
    if value is None or value.dtype != ir.DataType.FLOAT16:
        return value
    if value not in widened:
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}.widen")
        cast.outputs[0].name, cast.outputs[0].dtype = f"{value.name}.float32", ir.DataType.FLOAT
        cast.outputs[0].shape = value.shape
        graph.insert_before(before, cast)
        widened[value] = cast.outputs[0]
    return widened[value]


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: Mapping[str, object],
    *,
    domain: str = "",
    narrow: list[bool] | None = None,
) -> None:
    """Put another operator in a node's place; values keep their names, `narrow` outputs are rounded to float16."""
    old = list(node.outputs)
    new = ir.node(op_type, inputs, dict(attributes), domain=domain, num_outputs=len(old), name=node.name)
    results, casts = [], []
    for before, after, rounds in zip(old, new.outputs, narrow or [False] * len(old), strict=True):
        after.shape, after.type = before.shape, _type_of(before)
        if rounds:
            after.name, after.dtype = f"{before.name}.exact", ir.DataType.FLOAT
            cast = ir.node("Cast", [after], {"to": ir.DataType.FLOAT16}, name=f"{before.name}.round")
            casts.append(cast)
            after = cast.outputs[0]
            after.shape, after.type = before.shape, _type_of(before)
        after.name = before.name
        results.append(after)
    graph.insert_before(node, [new, *casts])
    ir.convenience.replace_all_uses_with(old, results, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _type_of(value: ir.Value | None) -> ir.TensorType | None:
    """A type of its own: values that share one share every later change of it."""
    return ir.TensorType(value.dtype) if value is not None and value.dtype is not None else None


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and not node.domain else None
