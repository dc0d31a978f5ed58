"""Parameters as graph inputs while passes run, so that no pass can fold or copy a weight."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def hide_weights(model: ir.Model, parameters: Mapping[str, str]) -> int:
    """Turn initializers into graph inputs, renamed. In place; returns the number hidden.

    Args:
        parameters: initializer name in the trace -> name in the checkpoint. Two names may map to one (tied table).
    """
    graph = model.graph
    hidden: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if name not in parameters:
            continue
        target = parameters[name]
        if target in hidden:
            value.replace_all_uses_with(hidden[target])
        else:
            new = ir.Value(name=target, type=value.type, shape=value.shape)
            value.replace_all_uses_with(new)
            graph.inputs.append(new)
            hidden[target] = new
        del graph.initializers[name]
    return len(hidden)
