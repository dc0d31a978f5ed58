"""Name the value each module returns `<module path>.out`, so that parity can look at it in the finished graph.

A value has one name: where a module returns what its last child computed, the child's name is used
(`mlp.down_proj.out` is also what `mlp` returns).
"""

from __future__ import annotations

import ast

import onnx_ir as ir

SCOPES_KEY = "pkg.torch.onnx.name_scopes"


def name_module_outputs(model: ir.Model) -> int:
    """Rename in place; returns the number of values named.

    Needs the exporter's scope metadata, so it runs before any pass that goes through a protobuf.
    """
    last: dict[str, ir.Value] = {}
    scopes = {node: _modules(node) for node in model.graph}
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            users = [user for user, _ in value.uses()]
            for path in scopes[node]:
                if value in outputs or any(path not in scopes[user] for user in users):
                    last[path] = value
    named: set[ir.Value] = set()
    for path in sorted(last, key=lambda p: -p.count(".")):
        if last[path] not in named:
            last[path].name = f"{path}.out"
            named.add(last[path])
    return len(named)


def _modules(node: ir.Node) -> list[str]:
    """Module paths that contain the node, outermost first (the last scope is the operation itself)."""
    text = node.metadata_props.get(SCOPES_KEY)
    return [scope for scope in ast.literal_eval(text)[:-1] if scope] if text else []
