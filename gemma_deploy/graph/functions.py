"""ONNX function bodies of the Vastai operators: what a runtime without them computes.

An accelerator takes `Vastai::QuantizedLinearPerChannel` as one node; everybody else inlines
y = MatMul(x, Transpose(DequantizeLinear(weight, scale, axis=0))). `Vastai::QuantizedLinearPerGroup` is the same with
scales along the inputs, one for every `block_size` of them. `Vastai::QuantizeDequantizePerToken` rounds what linears
read to 8 bits, y = Round(x / scale) * scale with scale = absmax of the token / 127: in front of a linear of int8
weights it says that an integer product is meant. `Vastai::QuantizeCache` and `Vastai::DequantizeCache` stand where keys
and values enter and leave an int8 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

DOMAIN = "Vastai"
DOMAIN_VERSION = 1
PER_TOKEN = "QuantizeDequantizePerToken"
QUANTIZE_CACHE, DEQUANTIZE_CACHE = "QuantizeCache", "DequantizeCache"


def quantized_linear_per_channel(opset: int) -> ir.Function:
    """x: [..., in] float32; weight: [out, in] int8; scale: [out] float32 -> [..., out] float32."""
    x, weight, scale = (ir.Value(name=name) for name in ("x", "weight", "scale"))
    dequantized = ir.node("DequantizeLinear", [weight, scale], {"axis": 0}, name="dequantize")
    transposed = ir.node("Transpose", [dequantized.outputs[0]], {"perm": [1, 0]}, name="transpose")
    product = ir.node("MatMul", [x, transposed.outputs[0]], name="matmul")
    for node, name in ((dequantized, "w"), (transposed, "wt"), (product, "y")):
        node.outputs[0].name = name
    graph = ir.Graph(
        [x, weight, scale],
        [product.outputs[0]],
        nodes=[dequantized, transposed, product],
        opset_imports={"": opset},
        name="QuantizedLinearPerChannel",
    )
    return ir.Function(DOMAIN, "QuantizedLinearPerChannel", "", graph=graph, attributes=[])


def quantized_linear_per_group(opset: int) -> ir.Function:
    """x: [..., in] float32; weight: [out, in] int8 or int4; scale: [out, in / block_size] float32 -> [..., out]."""
    x, weight, scale = (ir.Value(name=name) for name in ("x", "weight", "scale"))
    size = ir.RefAttr("block_size", "block_size", ir.AttributeType.INT)
    attributes = [ir.AttrInt64("axis", 1), size]
    dequantized = ir.Node("", "DequantizeLinear", [weight, scale], attributes, name="dequantize")
    transposed = ir.node("Transpose", [dequantized.outputs[0]], {"perm": [1, 0]}, name="transpose")
    product = ir.node("MatMul", [x, transposed.outputs[0]], name="matmul")
    for node, name in ((dequantized, "w"), (transposed, "wt"), (product, "y")):
        node.outputs[0].name = name
    graph = ir.Graph(
        [x, weight, scale],
        [product.outputs[0]],
        nodes=[dequantized, transposed, product],
        opset_imports={"": opset},
        name="QuantizedLinearPerGroup",
    )
    declared = ir.Attr("block_size", ir.AttributeType.INT, None)
    return ir.Function(DOMAIN, "QuantizedLinearPerGroup", "", graph=graph, attributes=[declared])


class Body:
    """A function body under construction: inputs by name, nodes in order."""

    def __init__(self, *inputs: str) -> None:
        self.inputs = [ir.Value(name=name) for name in inputs]
        self.nodes: list[ir.Node] = []

    def node(self, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
        """Add a node; its output has its name."""
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: float, name: str) -> ir.Value:
        """Add a float32 number."""
        return self.node("Constant", [], name, value=ir.tensor(np.float32(value), name=name))

    def function(
        self, name: str, outputs: Sequence[ir.Value], opset: int, *, attributes: Sequence[ir.Attr] = ()
    ) -> ir.Function:
        """The finished ONNX function."""
        graph = ir.Graph(self.inputs, outputs, nodes=self.nodes, opset_imports={"": opset}, name=name)
        return ir.Function(DOMAIN, name, "", graph=graph, attributes=attributes)


def quantize_dequantize_per_token(opset: int) -> ir.Function:
    """x: [..., channels] float32 -> the same, rounded half to even; tokens of zeros stay zeros."""
    body = Body("x")
    x = body.inputs[0]
    axes = body.node("Constant", [], "axes", value=ir.tensor(np.array([-1], np.int64), name="axes"))
    largest = body.node("ReduceMax", [body.node("Abs", [x], "magnitude"), axes], "absmax", keepdims=1)
    fitted = body.node("Div", [largest, body.constant(127.0, "most")], "fitted")
    zero = body.node("Equal", [fitted, body.constant(0.0, "nothing")], "zero")
    scale = body.node("Where", [zero, body.constant(1.0, "one"), fitted], "scale")
    codes = body.node("Round", [body.node("Div", [x, scale], "ratio")], "codes")
    return body.function(PER_TOKEN, [body.node("Mul", [codes, scale], "y")], opset)


def quantize_cache(opset: int) -> ir.Function:
    """x: [..., D] float32 or float16, factor: [Hk, 1, D] float32 -> codes int8 [..., D], scale float16 [..., 1].

    codes = Round(x / factor / scale), scale = absmax of x / factor over D, divided by 127 and rounded to float16.
    """
    body = Body("x", "factor")
    wide = body.node("Cast", [body.inputs[0]], "wide", to=ir.DataType.FLOAT.value)
    even = body.node("Div", [wide, body.inputs[1]], "even")
    axes = body.node("Constant", [], "axes", value=ir.tensor(np.array([-1], np.int64), name="axes"))
    largest = body.node("ReduceMax", [body.node("Abs", [even], "magnitude"), axes], "absmax", keepdims=1)
    fitted = body.node("Div", [largest, body.constant(127.0, "most")], "fitted")
    narrow = body.node("Cast", [fitted], "narrow", to=ir.DataType.FLOAT16.value)
    stored = body.node("Cast", [narrow], "stored", to=ir.DataType.FLOAT.value)
    zero = body.node("Equal", [stored, body.constant(0.0, "nothing")], "zero")
    unit = body.node("Where", [zero, body.constant(1.0, "one"), stored], "unit")
    rounded = body.node("Round", [body.node("Div", [even, unit], "ratio")], "rounded")
    clipped = body.node("Clip", [rounded, body.constant(-127.0, "low"), body.constant(127.0, "high")], "clipped")
    codes = body.node("Cast", [clipped], "codes", to=ir.DataType.INT8.value)
    scale = body.node("Cast", [unit], "scale", to=ir.DataType.FLOAT16.value)
    return body.function(QUANTIZE_CACHE, [codes, scale], opset)


def dequantize_cache(opset: int) -> ir.Function:
    """codes: int8 [..., D], scale: float16 [..., 1], factor: [Hk, 1, D] float32 -> [..., D] of the type `to`."""
    body = Body("codes", "scale", "factor")
    codes, scale = (
        body.node("Cast", [value], f"wide_{value.name}", to=ir.DataType.FLOAT.value) for value in body.inputs[:2]
    )
    product = body.node("Mul", [body.node("Mul", [codes, scale], "even"), body.inputs[2]], "product")
    node = ir.Node("", "Cast", [product], [ir.RefAttr("to", "to", ir.AttributeType.INT)], name="y")
    node.outputs[0].name = "y"
    body.nodes.append(node)
    declared = ir.Attr("to", ir.AttributeType.INT, None)
    return body.function(DEQUANTIZE_CACHE, [node.outputs[0]], opset, attributes=[declared])


def used_functions(model: ir.Model, opset: int) -> list[ir.Function]:
    """Bodies of the custom operators that occur in the model; those between ranks have none on one machine."""
    known = {
        "QuantizedLinearPerChannel": quantized_linear_per_channel,
        "QuantizedLinearPerGroup": quantized_linear_per_group,
        PER_TOKEN: quantize_dequantize_per_token,
        QUANTIZE_CACHE: quantize_cache,
        DEQUANTIZE_CACHE: dequantize_cache,
    }
    ops = {node.op_type for node in model.graph if node.domain == DOMAIN}
    return [known[op](opset) for op in sorted(ops & set(known))]
