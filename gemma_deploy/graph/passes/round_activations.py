"""Put the rounding of activations in front of the int8 linears of a graph, once for all that read one value.

Experts are rounded where they read the stream of tokens; what is inside their operator stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from gemma_deploy.graph.functions import DOMAIN, DOMAIN_VERSION, PER_TOKEN, QUANTIZED_EXPERTS
from gemma_deploy.names import LAYERS

FIRST_MATRIX = {"QuantizedLinearPerChannel": 1, QUANTIZED_EXPERTS: 3}  # operator -> which input multiplies the first


def round_activations(model: ir.Model, unrounded: Collection[str]) -> int:
    """Insert `Vastai::QuantizeDequantizePerToken`. In place; returns the number of nodes inserted.

    Args:
        unrounded: linears, by module path, whose inputs stay as they are. The LM head's does as well.
    """
    graph, rounded = model.graph, dict[ir.Value, ir.Value]()
    for node in list(graph):
        if node.op_type not in FIRST_MATRIX or node.domain != DOMAIN:
            continue
        x, weight = node.inputs[0], node.inputs[FIRST_MATRIX[node.op_type]]
        assert x is not None
        assert weight is not None
        module = str(weight.name).removesuffix(".weight")
        if not module.startswith(LAYERS) or module in unrounded:
            continue
        if x not in rounded:
            new = ir.node(PER_TOKEN, [x], domain=DOMAIN, name=f"{module}.round_input")
            value = new.outputs[0]
            value.name, value.shape, value.type = f"{module}.rounded", x.shape, ir.TensorType(ir.DataType.FLOAT)
            graph.insert_before(node, new)
            rounded[x] = value
        node.replace_input_with(0, rounded[x])
    if rounded:
        graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    return len(rounded)
