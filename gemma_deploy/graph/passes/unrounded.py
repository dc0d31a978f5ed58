"""Take the rounding of activations and of the cache out of a graph, to compare what is around it without it.

The operators stay where they are and get other bodies, which give their inputs as they are; codes become floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from gemma_deploy.graph.functions import DEQUANTIZE_CACHE, DOMAIN, PER_TOKEN, QUANTIZE_CACHE, Body


def leave_unrounded(model: ir.Model, opset: int) -> int:
    """In place; returns the number of operators that round no more."""
    bodies = {PER_TOKEN: _same(opset), QUANTIZE_CACHE: _unquantized(opset), DEQUANTIZE_CACHE: _undequantized(opset)}
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type in bodies]
    computed = {node.attributes["to"].as_int() for node in nodes if node.op_type == DEQUANTIZE_CACHE}
    if computed:
        dtype = ir.DataType(computed.pop())
        for value in _codes(nodes):
            value.type = ir.TensorType(dtype)
    for name in {node.op_type for node in nodes}:
        model.functions[bodies[name].identifier()] = bodies[name]
    return sum(node.op_type != DEQUANTIZE_CACHE for node in nodes)


def _codes(nodes: Sequence[ir.Node]) -> Iterator[ir.Value]:
    """Codes of the cache, those of all ranks of a joined graph together as well."""
    for node in nodes:
        if node.op_type == DEQUANTIZE_CACHE and node.inputs[0] is not None:
            yield node.inputs[0]
            divided = node.inputs[0].producer()
            if divided is not None and divided.op_type == "Split" and divided.inputs[0] is not None:
                yield divided.inputs[0]
        elif node.op_type == QUANTIZE_CACHE:
            yield node.outputs[0]
            yield from (user.outputs[0] for user, _ in node.outputs[0].uses() if user.op_type == "Concat")


def _same(opset: int) -> ir.Function:
    body = Body("x")
    return body.function(PER_TOKEN, [body.node("Identity", body.inputs, "y")], opset)


def _unquantized(opset: int) -> ir.Function:
    """Codes are x itself, every scale is 1."""
    body = Body("x", "factor")
    axes = body.node("Constant", [], "axes", value=ir.tensor(np.array([-1], np.int64), name="axes"))
    largest = body.node("ReduceMax", [body.node("Abs", body.inputs[:1], "magnitude"), axes], "absmax", keepdims=1)
    wide = body.node("Cast", [largest], "wide", to=ir.DataType.FLOAT.value)
    none = body.node("Mul", [wide, body.constant(0.0, "nothing")], "none")
    unit = body.node("Add", [none, body.constant(1.0, "one")], "unit")
    scale = body.node("Cast", [unit], "scale", to=ir.DataType.FLOAT16.value)
    return body.function(QUANTIZE_CACHE, [body.node("Identity", body.inputs[:1], "codes"), scale], opset)


def _undequantized(opset: int) -> ir.Function:
    body = Body("codes", "scale", "factor")
    y = body.node("Identity", body.inputs[:1], "y")
    declared = ir.Attr("to", ir.AttributeType.INT, None)
    return body.function(DEQUANTIZE_CACHE, [y], opset, attributes=[declared])
