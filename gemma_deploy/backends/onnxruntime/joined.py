"""What a drafter reads of the model it guesses for: its graph, made to give hidden states, and its embedding alone."""

from __future__ import annotations

import onnx_ir as ir

from gemma_deploy.backends.onnxruntime.decoder import EMBEDDED, NORMED
from gemma_deploy.backends.onnxruntime.exact import drop_unread


def give_states(model: ir.Model) -> str:
    """Let the graph give what leaves the last norm as well, [1, rows, hidden]. In place.

    Returns:
        The name of that output.
    """
    _give(model, NORMED)
    return NORMED


def cut_to_embedding(model: ir.Model) -> None:
    """Leave the graph nothing but the scaled embedding of tokens, [1, S, hidden]. In place."""
    graph = model.graph
    graph.outputs.clear()
    _give(model, EMBEDDED)
    drop_unread(graph)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)


def _give(model: ir.Model, name: str) -> None:
    """Make a value an output."""
    value = next(value for node in model.graph for value in node.outputs if value.name == name)
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((1, "rows", "hidden"))
    model.graph.outputs.append(value)
