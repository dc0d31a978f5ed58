"""An artifact's own graph, made to give the logits of several of the newest tokens, for decoding that looks ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.ort.apart import CHOSEN, drop_unread


def last_positions(model: ir.Model, most: int) -> None:
    """Let the graph give logits [1, min(S, most), V] of one row without padding. In place.

    The choice of the last token becomes one of the last `most`; layers and kernels stay as they are.
    """
    graph = model.graph
    chosen = [node for node in graph if str(node.outputs[0].name).endswith(CHOSEN)]
    made: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].name = f"last_positions.{name}"
        made.append(node)
        return node.outputs[0]

    def constant(number: int | list[int], name: str) -> ir.Value:
        array = np.asarray(number, np.int64)
        tensor = ir.tensor(array, name=f"last_positions.{name}")
        shape = ir.Shape(array.shape)
        value = ir.Value(name=tensor.name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
        return value

    ids = next(value for value in graph.inputs if value.name == "input_ids")
    count = add("Squeeze", [add("Shape", [ids], "size", start=1, end=2)], "count")
    first = add("Max", [add("Sub", [count, constant(most, "most")], "before"), constant(0, "zero")], "first")
    rows = add("Range", [first, count, constant(1, "one")], "rows")
    index = add("Unsqueeze", [rows, constant([0, 2], "axes")], "index")
    graph.insert_before(chosen[0], made)
    for node in chosen:
        node.replace_input_with(1, index)
    drop_unread(graph)
    for value in graph.outputs:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape(("batch", "rows", value.shape[2]))
