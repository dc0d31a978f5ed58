"""Inputs of the graph for a LoRA adapter: what it adds to a linear, computed beside it and not merged into its weights.

y = W x + B (A x): A and B are initializers that are inputs of the graph as well, so that a caller may replace them at
every run: as plain inputs, or with an adapter file of onnxruntime-genai. By default they have rank 0, and a product
over no channel is zero: the model is what it was. They stay float whatever W is stored as, and read what W reads before
a kernel rounds it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.graph.contract import AdapterSlots, Port


class Updates:
    """The inputs, and the nodes that add what they make.

    Args:
        nodes: of the graph; slots: which linears, of which shapes.

    Attributes:
        inputs: in the order in which linears were asked for.
    """

    def __init__(self, nodes: Nodes, slots: AdapterSlots) -> None:
        self.nodes, self.slots = nodes, slots
        self.inputs: list[ir.Value] = []

    def added(self, x: ir.Value, module: str, made: ir.Value) -> ir.Value:
        """What a linear makes, the adapter's part included.

        Args:
            x: [B, S, in], what the linear reads; made: [B, S, out], what its weights make of it.
        """
        down, up = (self._input(port) for port in self.slots.inputs(module))
        name, nodes, maker = made.name, self.nodes, made.producer()
        made.name = f"{module}.base"
        if maker is not None and maker.name == name:
            maker.name = made.name
        inner = nodes.one("MatMul", [x, down], f"{module}.lora_A.out")
        update = nodes.one("MatMul", [inner, up], f"{module}.lora_B.out")
        return nodes.one("Add", [made, update], str(name))

    def _input(self, port: Port) -> ir.Value:
        """An initializer without any value, which a caller may replace."""
        dtype = ir.DataType(BY_NAME[port.dtype].onnx)
        value = self.nodes.add(ir.Value(name=port.name, const_value=_empty(port, dtype)))
        value.shape = ir.Shape(port.shape)
        self.inputs.append(value)
        return value


def _empty(port: Port, dtype: ir.DataType) -> ir.Tensor[np.ndarray]:
    """The matrix of rank 0."""
    sizes = [0 if isinstance(size, str) else size for size in port.shape]
    return ir.Tensor(np.zeros(sizes, dtype.numpy()), dtype=dtype, name=port.name)
