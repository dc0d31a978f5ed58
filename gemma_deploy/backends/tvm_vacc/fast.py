"""Rewrites an int8 graph into ORT's fast kernel. Runs at load, before a `fast` session is opened.

ORT makes the same MatMulNBits nodes out of the function body by itself, with the same numbers, but takes 17 to 22 s per
graph of the 270M for it; this takes 1.5 s (tests/runtime/test_session.py compares the two). Activations are rounded to
int8 in blocks of 32 inside the kernel: a fast session is compared with the reference on its own.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gemma_deploy.names import MICROSOFT

BLOCK = 32  # weights that share a scale in the kernel: what ORT chooses for a scale per channel
CODES = (ir.DataType.INT8, ir.DataType.INT4)
LINEARS = ("QuantizedLinearPerChannel", "QuantizedLinearPerGroup")
INT8_ACTIVATIONS = 4  # accuracy_level; 0 and 1 are a hundred times slower (docs/design.md 3)


def to_matmulnbits(model: ir.Model, arrays: dict[str, np.ndarray]) -> list[str]:
    """Put MatMulNBits in the place of every quantized linear it can stand for. In place.

    Args:
        model: iter0 or iter1 of an int8 artifact.
        arrays: weights as the kernel takes them, by name. Those of another graph of the artifact are used again; new
            ones are added.

    Returns:
        Names in `arrays` that the session must be given: the graph holds no data for them.
    """
    graph, used = model.graph, dict[str, None]()
    for node in list(graph):
        if node.op_type not in LINEARS:
            continue
        x, weight, scale = node.inputs
        if weight is None or scale is None or weight.const_value is None or scale.const_value is None:
            continue
        if weight.const_value.dtype not in CODES or scale.const_value.dtype != ir.DataType.FLOAT:
            continue  # no graph of ours: ONNX Runtime says what is wrong with it
        rows, columns = weight.const_value.shape.numpy()
        block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else BLOCK
        if columns % block or block % BLOCK:
            continue
        blocks, bits = columns // block, 4 if weight.const_value.dtype == ir.DataType.INT4 else 8
        names = f"{weight.name}.blocks", f"{scale.name}.blocks"
        if names[0] not in arrays:
            scales = scale.const_value.numpy()
            arrays[names[0]] = _unsigned(weight.const_value.numpy(), bits).reshape(rows, blocks, -1)
            arrays[names[1]] = scales if scales.ndim == 2 else np.repeat(scales, blocks).reshape(rows, blocks)
        used |= dict.fromkeys(names)
        inputs = [x, *(_named(graph, name, arrays[name]) for name in names)]
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": INT8_ACTIVATIONS}
        new = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=node.name)
        old, result = node.outputs[0], new.outputs[0]
        result.name, result.shape, result.type = old.name, old.shape, ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with([old], [result], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        for value in (weight, scale):
            if not value.uses():
                graph.initializers.pop(str(value.name), None)
    if used:
        graph.opset_imports.setdefault(MICROSOFT, 1)
    return list(used)


def _unsigned(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes [rows, columns] as the kernel takes them: zero point 2**(bits - 1), two of 4 bits in a byte."""
    if bits == 8:
        eight: np.ndarray = codes.view(np.uint8) ^ 0x80
        return eight
    four = (codes.astype(np.int8) + 8).view(np.uint8)
    packed: np.ndarray = four[:, 0::2] | (four[:, 1::2] << 4)
    return packed


def _named(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer without data: external, in a file that ORT never opens because the session is given the array."""
    if name in graph.initializers:
        return graph.initializers[name]
    dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
    value.const_value = ir.ExternalTensor("given-to-the-session", 0, array.nbytes, dtype, shape=shape, name=name)
    graph.register_initializer(value)
    return value
