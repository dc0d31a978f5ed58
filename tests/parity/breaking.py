"""Ways to break an artifact: one number in the parameter file, or one node of a graph."""

import json

import numpy as np
import onnx
from onnx import helper, numpy_helper

DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8, "BF16": np.uint16}


def change_tensor(artifact, name, change):
    """Replace a tensor of params.safetensors by `change(array)`, where it lies."""
    path = artifact / "params.safetensors"
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        row = json.loads(file.read(size))[name]
    dtype = DTYPES[row["dtype"]]
    array = np.memmap(path, dtype, "r+", 8 + size + row["data_offsets"][0], tuple(row["shape"]))
    changed = np.asarray(change(np.array(array)))
    assert (changed != array).any(), "nothing was broken"
    array[...] = changed.astype(dtype)
    array.flush()


class Graph:
    """A graph of an artifact, saved on leaving the `with` block; weights stay in the parameter file."""

    def __init__(self, artifact, name):
        self.path = artifact / f"{name}.onnx"

    def __enter__(self):
        self.model = onnx.load(self.path, load_external_data=False)
        self.graph = self.model.graph
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            onnx.save(self.model, self.path)

    def maker(self, output):
        """The node that makes a value."""
        return next(node for node in self.graph.node if output in node.output)

    def maker_of_op(self, op_type, module):
        """The one node of an operator inside a module."""
        (found,) = (node for node in self.graph.node if node.op_type == op_type and node.name.startswith(f"{module}."))
        return found

    def consumers(self, name):
        return [node for node in self.graph.node if name in node.input]

    def constant(self, value):
        """A new initializer."""
        name = f"broken.{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def value(self, name):
        """A small initializer's array."""
        return numpy_helper.to_array(next(each for each in self.graph.initializer if each.name == name))

    def replace_constant(self, node, index, change):
        """Give one node another constant; other nodes that share the old one keep it."""
        old = self.value(node.input[index])
        node.input[index] = self.constant(np.asarray(change(old), old.dtype))

    def put_between(self, name, op, other, before=None):
        """Let all consumers of a value (or those chosen) read `op(value, other)` instead."""
        consumers = before or self.consumers(name)
        made = f"{name}.broken"
        for node in consumers:
            node.input[:] = [made if each == name else each for each in node.input]
        first = next(i for i, node in enumerate(self.graph.node) if any(node is each for each in consumers))
        self.graph.node.insert(first, helper.make_node(op, [name, self.constant(other)], [made]))

    def swap_shared_inputs(self, first, second, shared):
        """Exchange what the nodes of two layers read from values that several layers share, in the order of use."""
        uses = [
            [(node, i) for node in self.graph.node if node.output[0].startswith(layer)
             for i, name in enumerate(node.input) if name.startswith(shared)]
            for layer in (first, second)
        ]  # fmt: skip
        for (one, i), (other, j) in zip(*uses, strict=True):
            assert one.op_type == other.op_type
            one.input[i], other.input[j] = other.input[j], one.input[i]
