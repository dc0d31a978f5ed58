"""ONNX function bodies of the Vastai operators: what a runtime without them computes.

An accelerator takes `Vastai::QuantizedLinearPerChannel` as one node; everybody else inlines
y = MatMul(x, Transpose(DequantizeLinear(weight, scale, axis=0))). `Vastai::QuantizedLinearPerGroup` is the same with
scales along the inputs, one for every `block_size` of them. `Vastai::QuantizeDequantizePerToken` rounds what linears
read to 8 bits, y = Round(x / scale) * scale with scale = absmax of the token / 127: in front of a linear of int8
weights it says that an integer product is meant. `Vastai::QuantizeCache` and `Vastai::DequantizeCache` stand where keys
and values enter and leave an int8 cache. `Vastai::MixtureOfExperts` and `Vastai::QuantizedMixtureOfExperts` run each
token through the experts that it was given; their bodies run it through all, and multiply by zero.
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
EXPERTS, QUANTIZED_EXPERTS = "MixtureOfExperts", "QuantizedMixtureOfExperts"


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

    def integers(self, values: Sequence[int], name: str) -> ir.Value:
        """Add a vector of whole numbers."""
        return self.node("Constant", [], name, value=ir.tensor(np.array(values, np.int64), name=name))

    def with_attributes(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, *, attributes: Sequence[ir.Attr]
    ) -> ir.Value:
        """Add a node some of whose attributes are the function's own."""
        node = ir.Node("", op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

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
    to = ir.RefAttr("to", "to", ir.AttributeType.INT)
    y = body.with_attributes("Cast", [product], "y", attributes=[to])
    declared = ir.Attr("to", ir.AttributeType.INT, None)
    return body.function(DEQUANTIZE_CACHE, [y], opset, attributes=[declared])


def mixture_of_experts(opset: int) -> ir.Function:
    """Gated MLPs of experts, added up with weights.

    x: [B, S, H]; weights: [B, S, k] float32 and experts: [B, S, k] int64, of each token, E for none (a rank is told so
    of other ranks' experts); gate_up: [E, 2I, H], gates first; down: [E, H, I] -> [B, S, H]; attribute approximate: as
    of Gelu.
    """
    body = Body("x", "weights", "experts", "gate_up", "down")
    return body.function(EXPERTS, [_experts(body, *body.inputs)], opset, attributes=[APPROXIMATE])


def quantized_mixture_of_experts(opset: int) -> ir.Function:
    """The same with int8 or int4 codes of the matrices, and float32 scales of groups of their columns.

    gate_up_scale: [E, 2I, groups], of gate_up_block_size columns each; down_scale: [E, H, groups], of down_block_size.
    """
    body = Body("x", "weights", "experts", "gate_up", "gate_up_scale", "down", "down_scale")
    matrices = []
    for codes, scale in (body.inputs[3:5], body.inputs[5:7]):
        size = ir.RefAttr("block_size", f"{codes.name}_block_size", ir.AttributeType.INT)
        attributes = [ir.AttrInt64("axis", 2), size]
        matrices.append(
            body.with_attributes("DequantizeLinear", [codes, scale], f"{codes.name}_matrix", attributes=attributes)
        )
    sizes = [ir.Attr(f"{name}_block_size", ir.AttributeType.INT, None) for name in ("gate_up", "down")]
    result = _experts(body, *body.inputs[:3], *matrices)
    return body.function(QUANTIZED_EXPERTS, [result], opset, attributes=[APPROXIMATE, *sizes])


APPROXIMATE = ir.Attr("approximate", ir.AttributeType.STRING, None)


def _experts(
    body: Body, x: ir.Value, weights: ir.Value, experts: ir.Value, gate_up: ir.Value, down: ir.Value
) -> ir.Value:
    """All experts on all tokens: what a token was not given counts nothing."""
    second, last = body.integers([1], "second_axis"), body.integers([-1], "last_axis")
    bits = body.node("Constant", [], "bits", value=ir.tensor(np.array([0, 1], np.float32), name="bits"))
    count = body.node("Shape", [down], "count", start=0, end=1)
    given = body.node("OneHot", [experts, count, bits], "given", axis=-1)
    weighted = body.node("Mul", [given, body.node("Unsqueeze", [weights, last], "column")], "weighted")
    shares = body.node("ReduceSum", [weighted, body.integers([-2], "choices")], "shares", keepdims=0)
    by_expert = body.node("Transpose", [shares], "by_expert", perm=[2, 0, 1])
    of_experts = body.node("Unsqueeze", [by_expert, last], "of_experts")
    matrices = []
    for one, name in ((gate_up, "gate_up"), (down, "down")):
        turned = body.node("Transpose", [one], f"{name}_turned", perm=[0, 2, 1])
        matrices.append(body.node("Unsqueeze", [turned, second], f"{name}_right"))
    both = body.node("MatMul", [x, matrices[0]], "both")
    split = ir.node("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2, name="halves")
    gate, up = split.outputs
    gate.name, up.name = "gate", "up"
    body.nodes.append(split)
    how = [ir.RefAttr("approximate", "approximate", ir.AttributeType.STRING)]
    inner = body.node("Mul", [body.with_attributes("Gelu", [gate], "activated", attributes=how), up], "inner")
    made = body.node("MatMul", [inner, matrices[1]], "made")
    counted = body.node("Mul", [made, body.node("CastLike", [of_experts, made], "factors")], "counted")
    return body.node("ReduceSum", [counted, body.integers([0], "all_experts")], "y", keepdims=0)


def used_functions(model: ir.Model, opset: int) -> list[ir.Function]:
    """Bodies of the custom operators that occur in the model; those between ranks have none on one machine."""
    known = {
        "QuantizedLinearPerChannel": quantized_linear_per_channel,
        "QuantizedLinearPerGroup": quantized_linear_per_group,
        PER_TOKEN: quantize_dequantize_per_token,
        QUANTIZE_CACHE: quantize_cache,
        DEQUANTIZE_CACHE: dequantize_cache,
        EXPERTS: mixture_of_experts,
        QUANTIZED_EXPERTS: quantized_mixture_of_experts,
    }
    ops = {node.op_type for node in model.graph if node.domain == DOMAIN}
    return [known[op](opset) for op in sorted(ops & set(known))]
