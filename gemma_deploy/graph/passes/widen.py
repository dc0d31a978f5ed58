"""Compute Softmax and GELU of a float16 graph in float32, between casts that are written out.

ONNX defines both by bodies of simpler operators, and a runtime without a float16 kernel of its own takes them apart
before it puts in casts: ONNX Runtime 1.32 on a CPU runs seven to ten operators in the place of each. With the casts in
the graph every runtime has one operator in float32, and the result is rounded to float16 once.
"""

from __future__ import annotations

import onnx_ir as ir

WIDENED = ("Softmax", "Gelu")


def widen(model: ir.Model) -> int:
    """In place; returns the number of operators between casts."""
    graph, count = model.graph, 0
    for node in list(graph):
        x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.domain or node.op_type not in WIDENED or x is None or x.dtype != ir.DataType.FLOAT16:
            continue
        name = str(y.name)
        before = _cast(x, ir.DataType.FLOAT, f"{name}.widened_input")
        inner = ir.node(node.op_type, [before.outputs[0]], dict(node.attributes), name=node.name)
        inner.outputs[0].name, inner.outputs[0].shape = f"{name}.unrounded", y.shape
        inner.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        after = _cast(inner.outputs[0], ir.DataType.FLOAT16, name)
        graph.insert_before(node, [before, inner, after])
        y.name = None
        ir.convenience.replace_all_uses_with([y], [after.outputs[0]], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        count += 1
    return count


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype.value}, name=f"{name}.cast")
    made = node.outputs[0]
    made.name, made.shape, made.type = name, value.shape, ir.TensorType(dtype)
    return node
