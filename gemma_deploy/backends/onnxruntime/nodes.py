"""A graph under construction: nodes in order, small initializers made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Nodes:
    """Nodes and initializers of a graph.

    Args:
        initializers: of the graph around it, whose it shares, where it is the body of a node.
    """

    def __init__(self, initializers: dict[str, ir.Value] | None = None) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {} if initializers is None else initializers

    def many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        names: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node with several outputs; an empty name is an output that nobody reads."""
        given = {key: value for key, value in attributes.items() if value is not None}
        node = ir.node(op_type, inputs, given, domain=domain, num_outputs=len(names))
        for value, name in zip(node.outputs, names, strict=True):
            value.name = name
        node.name = node.outputs[0].name
        self.nodes.append(node)
        return list(node.outputs)

    def one(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node with one output, which has its name."""
        return self.many(op_type, inputs, [name], domain=domain, **attributes)[0]

    def constant(self, value: np.ndarray | np.generic, name: str) -> ir.Value:
        """A small initializer, made once however often it is asked for."""
        if name not in self.initializers:
            self.add(ir.Value(name=name, const_value=ir.tensor(np.asarray(value), name=name)))
        return self.initializers[name]

    def add(self, value: ir.Value) -> ir.Value:
        """Register an initializer that has its tensor."""
        tensor = value.const_value
        assert tensor is not None, value.name
        assert value.name is not None
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        self.initializers[value.name] = value
        return value

    def numbers(self, *values: int) -> ir.Value:
        """An int64 vector as an initializer."""
        return self.constant(np.array(values, np.int64), "int64." + ".".join(map(str, values)))

    def scalar(self, value: float) -> ir.Value:
        """A float32 scalar as an initializer."""
        return self.constant(np.float32(value), f"float32.{float(np.float32(value))!r}")
