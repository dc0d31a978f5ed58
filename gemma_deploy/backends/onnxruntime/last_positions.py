"""An artifact's own graph, made to give the logits of several of the newest tokens, for decoding that looks ahead."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.onnxruntime.exact import CHOSEN, Before, drop_unread


def last_positions(model: ir.Model, most: int) -> None:
    """Let the graph give logits [1, min(S, most), V] of one row without padding. In place.

    The choice of the last token becomes one of the last `most`; layers and kernels stay as they are.
    """
    graph = model.graph
    chosen = [node for node in graph if str(node.outputs[0].name).endswith(CHOSEN)]
    here = Before(graph, chosen[0])

    def constant(number: int | list[int], what: str) -> ir.Value:
        return here.constant(np.asarray(number, np.int64), what)

    ids = next(value for value in graph.inputs if value.name == "input_ids")
    count = here.add("Squeeze", [here.add("Shape", [ids], "size", start=1, end=2)], "count")
    before = here.add("Sub", [count, constant(most, "most")], "before")
    first = here.add("Max", [before, constant(0, "zero")], "first")
    rows = here.add("Range", [first, count, constant(1, "one")], "rows")
    index = here.add("Unsqueeze", [rows, constant([0, 2], "axes")], "index")
    for node in chosen:
        node.replace_input_with(1, index)
    drop_unread(graph)
    for value in graph.outputs:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape(("batch", "rows", value.shape[2]))
