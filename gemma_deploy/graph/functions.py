"""ONNX function bodies of the Vastai operators: what a run time without them computes.

An accelerator takes `Vastai::QuantizedLinearPerChannel` as one node; everybody else inlines
y = MatMul(x, Transpose(DequantizeLinear(weight, scale, axis=0))). `Vastai::QuantizedLinearPerGroup` is the same with
scales along the inputs, one for every `block_size` of them. `Vastai::QuantizeDequantizePerToken` rounds what linears
read to 8 bits, y = Round(x / scale) * scale with scale = absmax of the token / 127: in front of a linear of int8
weights it says that an integer product is meant.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

DOMAIN = "Vastai"
DOMAIN_VERSION = 1
PER_TOKEN = "QuantizeDequantizePerToken"


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


def quantize_dequantize_per_token(opset: int) -> ir.Function:
    """x: [..., channels] float32 -> the same, rounded half to even; tokens of zeros stay zeros."""
    x = ir.Value(name="x")
    nodes: list[ir.Node] = []

    def made(op_type: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        nodes.append(node)
        return node.outputs[0]

    def constant(value: float, name: str) -> ir.Value:
        return made("Constant", [], name, value=ir.tensor(np.float32(value), name=name))

    axes = made("Constant", [], "axes", value=ir.tensor(np.array([-1], np.int64), name="axes"))
    largest = made("ReduceMax", [made("Abs", [x], "magnitude"), axes], "absmax", keepdims=1)
    fitted = made("Div", [largest, constant(127.0, "most")], "fitted")
    zero = made("Equal", [fitted, constant(0.0, "nothing")], "zero")
    scale = made("Where", [zero, constant(1.0, "one"), fitted], "scale")
    codes = made("Round", [made("Div", [x, scale], "ratio")], "codes")
    y = made("Mul", [codes, scale], "y")
    graph = ir.Graph([x], [y], nodes=nodes, opset_imports={"": opset}, name=PER_TOKEN)
    return ir.Function(DOMAIN, PER_TOKEN, "", graph=graph, attributes=[])


def used_functions(model: ir.Model, opset: int) -> list[ir.Function]:
    """Bodies of the custom operators that occur in the model; those between ranks have none on one machine."""
    known = {
        "QuantizedLinearPerChannel": quantized_linear_per_channel,
        "QuantizedLinearPerGroup": quantized_linear_per_group,
        PER_TOKEN: quantize_dequantize_per_token,
    }
    ops = {node.op_type for node in model.graph if node.domain == DOMAIN}
    return [known[op](opset) for op in sorted(ops & set(known))]
