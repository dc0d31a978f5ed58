"""Keep keys and values as 8-bit codes: quantized where they leave the graph, dequantized where attention reads them.

Attention reads the new token's key and value through their codes as well, so that a token weighs the same in the step
that makes it, in later steps, and in a prefill.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.calibration.points import cache_factor_names
from gemma_deploy.graph.contract import GraphContract, Port
from gemma_deploy.graph.external import onnx_type
from gemma_deploy.graph.functions import DEQUANTIZE_CACHE, DOMAIN, DOMAIN_VERSION, QUANTIZE_CACHE

SHAPE = "cache_factor.shape"


def quantize_cache(model: ir.Model, contract: GraphContract, graph: str, *, layers: Sequence[LayerSpec]) -> int:
    """Turn the caches of a graph into codes and scales. In place; returns the number of caches.

    Args:
        contract: with an int8 cache; graph: which of its graphs the model is, with caches as they are computed.
        layers: of the whole model.
    """
    inputs = {port.name: _value(port) for port in contract.inputs(graph) if port.name.startswith("past_key_values.")}
    outputs = {port.name: port for port in contract.outputs(graph)}
    done = 0
    for layer in layers[contract.first_layer : contract.first_layer + contract.layers]:
        for part, name in cache_factor_names(layer).items():
            done += 1
            factor = _factor(model.graph, contract, name, layer=layer.index)
            past, present = f"past_key_values.{layer.index}.{part}", f"present.{layer.index}.{part}"
            if past in inputs:
                read = next(value for value in model.graph.inputs if value.name == past)
                node = _dequantize(inputs[past], inputs[f"{past}_scale"], factor, read, f"{past}.read")
                read.replace_all_uses_with(node.outputs[0])
                model.graph.append(node)
            _change_present(model.graph, factor, present, outputs, f"{layer.prefix}{layer.branches[0].module}.{part}")
    kept = [value for value in model.graph.inputs if value.name not in inputs]
    model.graph.inputs[:] = [*kept, *inputs.values()]
    model.graph.sort()
    model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    return done


def _factor(graph: ir.Graph, contract: GraphContract, name: str, *, layer: int) -> ir.Value:
    """[Hk, 1, D], from the parameter of that name."""
    heads, size = contract.kv_shape(layer)
    parameter = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([heads * size]))
    graph.initializers.add(parameter)  # its data comes with the parameter file
    usual = (heads, size) == (contract.kv_heads, contract.head_dim)
    called = SHAPE if usual else f"{SHAPE}.{heads}.{size}"
    if called not in graph.initializers:
        sizes = ir.tensor([heads, 1, size], dtype=ir.DataType.INT64, name=called)
        shape = ir.Value(name=called, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([3]), const_value=sizes)
        graph.register_initializer(shape)
    node = ir.node("Reshape", [parameter, graph.initializers[called]], name=f"{name}.by_head")
    node.outputs[0].name, node.outputs[0].type = f"{name}.by_head", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([heads, 1, size])
    graph.append(node)
    return node.outputs[0]


def _change_present(graph: ir.Graph, factor: ir.Value, name: str, ports: dict[str, Port], inner: str) -> None:
    at = next(i for i, value in enumerate(graph.outputs) if value.name == name)
    made = graph.outputs[at]
    wrapper = made.producer()
    assert wrapper is not None
    if wrapper.op_type == "Identity" and wrapper.inputs[0] is not None:
        made = wrapper.inputs[0]
    else:
        made.name = inner
    node = ir.node(QUANTIZE_CACHE, [made, factor], domain=DOMAIN, num_outputs=2, name=f"{name}.quantize")
    for value, port in zip(node.outputs, (ports[name], ports[f"{name}_scale"]), strict=True):
        value.name, value.type, value.shape = port.name, ir.TensorType(onnx_type(port.dtype)), ir.Shape(port.shape)
    graph.outputs[at : at + 1] = list(node.outputs)
    if made is not wrapper.outputs[0]:
        graph.remove(wrapper, safe=True)
    back = _dequantize(node.outputs[0], node.outputs[1], factor, made, f"{inner}.read")
    for user, index in list(made.uses()):
        if user is not node:
            user.replace_input_with(index, back.outputs[0])
    graph.extend([node, back])


def _dequantize(codes: ir.Value, scale: ir.Value, factor: ir.Value, like: ir.Value, name: str) -> ir.Node:
    dtype = like.dtype or ir.DataType.FLOAT
    node = ir.node(DEQUANTIZE_CACHE, [codes, scale, factor], {"to": dtype.value}, domain=DOMAIN, name=name)
    value = node.outputs[0]
    value.name, value.type, value.shape = name, ir.TensorType(dtype), like.shape
    return node


def _value(port: Port) -> ir.Value:
    return ir.Value(name=port.name, type=ir.TensorType(onnx_type(port.dtype)), shape=ir.Shape(port.shape))
