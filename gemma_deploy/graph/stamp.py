"""Cut the traced parts apart and build the whole graph: prologue, every layer, epilogue.

Fifth step of the export: Part templates -> ir.Model with the contract's inputs and outputs. A layer is a copy of its
template in which `model.layers.<template>` reads `model.layers.<i>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.errors import ExportError
from gemma_deploy.graph.contract import (
    BORROWED,
    DECODE,
    ENTERING,
    ENTERING_VECTORS,
    LEAVING,
    LEAVING_VECTORS,
    GraphContract,
    Port,
)
from gemma_deploy.graph.disconnected import VECTOR, TraceBorder, computes_last, own_name
from gemma_deploy.graph.external import onnx_type
from gemma_deploy.names import LAST_POSITION, PER_LAYER_VECTORS, STREAMS


@dataclass(frozen=True)
class Template:
    """The nodes of one part in topological order; everything they read is an input, a weight or a small constant."""

    part: TraceBorder
    nodes: tuple[ir.Node, ...]
    prefix: str
    inputs: dict[str, ir.Value]
    outputs: dict[str, ir.Value]


def cut(model: ir.Model, parts: Iterable[TraceBorder], layer_prefixes: dict[str, str]) -> dict[str, Template]:
    """One template per part.

    Args:
        layer_prefixes: part name -> module path of the traced layer (`model.layers.0.`).

    Raises:
        ExportError: a part reads another part's input, so it cannot be cut out.
    """
    values = {value.name: value for value in model.graph.inputs}
    owner = {name: part.name for part in parts for name, _ in part.inputs}
    templates = {}
    for part in parts:
        outputs = {border: model.graph.outputs[index] for index, border in _output_indices(model, part)}
        nodes = _ancestors(model, outputs.values())
        for node in nodes:
            for value in node.inputs:
                if value is not None and owner.get(value.name or "", part.name) != part.name:
                    raise ExportError(
                        f"{part.name} reads {value.name}, an input of {owner[value.name or '']}",
                        where="export stage",
                        next_step="this is a bug: report it",
                    )
        inputs = {border: values[name] for name, border in part.inputs}
        templates[part.name] = Template(part, nodes, layer_prefixes.get(part.name, ""), inputs, outputs)
    return templates


def _output_indices(model: ir.Model, part: TraceBorder) -> list[tuple[int, str]]:
    index = {value.name: i for i, value in enumerate(model.graph.outputs)}
    return [(index[name], border) for name, border in part.outputs]


def _ancestors(model: ir.Model, outputs: Iterable[ir.Value]) -> tuple[ir.Node, ...]:
    wanted = _ancestor_set(outputs)
    return tuple(node for node in model.graph if node in wanted)


def _ancestor_set(outputs: Iterable[ir.Value]) -> set[ir.Node]:
    wanted, stack = set[ir.Node](), [value.producer() for value in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in wanted:
            continue
        wanted.add(node)
        stack += [value.producer() for value in node.inputs if value is not None]
    return wanted


class Builder:
    """The graph under construction."""

    def __init__(self, source: ir.Model, contract: GraphContract, graph: str):
        self.contract, self.graph_name = contract, graph
        self.constants = dict(source.graph.initializers)
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs = {port.name: _value(port) for port in contract.inputs(graph)}

    def place(
        self, template: Template, inputs: dict[str, ir.Value], prefix: str, *, wanted: Iterable[str] | None = None
    ) -> dict[str, ir.Value]:
        """Copy a template's nodes with these border inputs; returns its border outputs.

        Args:
            wanted: border outputs that are needed, all by default; what only others need is left out.
            prefix: module path that replaces the template's own (`model.layers.5.`), also put before unnamed values.
        """
        mapping: dict[ir.Value, ir.Value] = {template.inputs[border]: value for border, value in inputs.items()}
        border_inputs = set(template.inputs.values())

        def rename(name: str) -> str:
            name = own_name(name)
            if template.prefix and name.startswith(template.prefix):
                return prefix + name.removeprefix(template.prefix)
            return name

        def mapped(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in mapping:
                return value if value is None else mapping[value]
            if value in border_inputs:
                raise ExportError(
                    f"{template.part.name}: input {value.name} is not connected",
                    where="export stage",
                    next_step="this is a bug: report it",
                )
            mapping[value] = self._initializer(value, rename(value.name or ""))
            return mapping[value]

        outputs = {name: template.outputs[name] for name in (template.outputs if wanted is None else wanted)}
        needed = set(template.nodes) if wanted is None else _ancestor_set(outputs.values())
        for node in (node for node in template.nodes if node in needed):
            copy = ir.Node(
                node.domain,
                node.op_type,
                [mapped(value) for value in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                name=_qualified(node.name or node.op_type, rename, prefix),
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name = _qualified(old.name or "", rename, prefix)
                new.type, new.shape = old.type, _known(old.shape)
                mapping[old] = new
            self.nodes.append(copy)
        return {border: mapping.get(value, value) for border, value in outputs.items()}

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | np.ndarray | np.int64], name: str, **attributes: int
    ) -> ir.Value:
        """Add a node that no template has; its output has its name, and its constants theirs."""
        values = [value if isinstance(value, ir.Value) else self._constant(np.asarray(value)) for value in inputs]
        node = ir.node(op_type, values, attributes, name=name)
        made, like = node.outputs[0], values[0]
        made.name, made.type = name, ir.TensorType(like.dtype or ir.DataType.FLOAT)
        self.nodes.append(node)
        return made

    def _constant(self, array: np.ndarray) -> ir.Value:
        """A small constant, once for all who read it."""
        name = "const." + "_".join(map(str, [*array.shape, *array.reshape(-1)]))
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
            value.const_value = tensor
            self.initializers[name] = value
        return self.initializers[name]

    def _initializer(self, source: ir.Value, name: str) -> ir.Value:
        """A weight (no data yet) or a small constant shared by all layers."""
        constant = source.name in self.constants
        name = f"const.{source.name}" if constant else name
        if name not in self.initializers:
            value = ir.Value(name=name, type=source.type, shape=source.shape)
            if constant:
                value.const_value = source.const_value
            self.initializers[name] = value
        return self.initializers[name]

    def finish(self, outputs: dict[str, ir.Value], opset_imports: dict[str, int]) -> ir.Model:
        """The model with the contract's outputs, renamed and in order."""
        results = []
        for port in self.contract.outputs(self.graph_name):
            value = outputs[port.name]
            if value.name != port.name:  # keep `<module>.out` names: parity looks for them
                node = ir.node("Identity", [value], name=f"{port.name}.identity")
                self.nodes.append(node)
                value = node.outputs[0]
            value.name, value.type = port.name, ir.TensorType(onnx_type(port.dtype))
            value.shape = ir.Shape(port.shape)
            results.append(value)
        graph = ir.Graph(
            list(self.inputs.values()),
            results,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=opset_imports,
            name=self.graph_name,
        )
        return ir.Model(graph, ir_version=10, producer_name="gemma-deploy")


def _value(port: Port) -> ir.Value:
    return ir.Value(name=port.name, type=ir.TensorType(onnx_type(port.dtype)), shape=ir.Shape(port.shape))


def _known(shape: ir.Shape | None) -> ir.Shape | None:
    """Fixed dimensions only: the trace's names of free ones mean nothing across parts."""
    return None if shape is None else ir.Shape([dim if isinstance(dim, int) else None for dim in shape])


def _qualified(name: str, rename: Callable[[str], str], prefix: str) -> str:
    renamed = rename(name)
    return renamed if renamed != name or not prefix or name.startswith("model.") else f"{prefix}{name}"


def stamp(
    source: ir.Model,
    templates: dict[str, Template],
    layers: Sequence[LayerSpec],
    *,
    contract: GraphContract,
    graph: str,
) -> ir.Model:
    """Build the graph of the layers in `contract`.

    Args:
        layers: of the whole model.

    Raises:
        ExportError: an input of a part is left unconnected.
    """
    build = Builder(source, contract, graph)
    layers = layers[contract.first_layer : contract.first_layer + contract.layers]
    stream = _Stream(build, _prologue(build, templates["prologue"], layers))
    outputs = dict[str, ir.Value]()
    for layer in layers:
        if computes_last(layer, graph):
            stream.keep_last()
        result = build.place(templates[f"layer.{layer.template}"], stream.of(layer), layer.prefix)
        stream.leave(layer, result)
        outputs |= {f"present.{layer.index}.{part}": result[f"present.{part}"] for part, _ in layer.caches}
    if contract.heads:
        outputs["logits"] = build.place(templates["epilogue"], {"hidden": stream.values["hidden"]}, "epilogue.")[
            "logits"
        ]
    else:
        outputs[LEAVING] = stream.values["hidden"]
        outputs |= stream.vectors_behind()
    return build.finish(outputs, dict(source.opset_imports))


def _prologue(build: Builder, template: Template, layers: Sequence[LayerSpec]) -> dict[str, ir.Value]:
    """What these layers read of it, by border name; a stage that does not embed has the others' hidden states."""
    kinds, embeds = dict.fromkeys(layer.kind for layer in layers), build.contract.embeds
    wanted = [f"{what}.{kind}" for kind in kinds for what in ("mask", "cos", "sin")]
    names = ("input_ids", "attention_mask", "position_ids") if embeds else ("attention_mask", "position_ids")
    given = {name: build.inputs[name] for name in names}
    vectors = ["vectors"] if "vectors" in template.outputs else []
    made = build.place(template, given, "prologue.", wanted=[*(["hidden", *vectors] if embeds else []), *wanted])
    if vectors and embeds:
        made["vectors"].name = PER_LAYER_VECTORS
    if embeds and layers[0].altup is not None:
        made["hidden"].name = STREAMS
    if embeds:
        return made
    entering = {"vectors": build.inputs[ENTERING_VECTORS]} if vectors else {}
    return {**made, "hidden": build.inputs[ENTERING], **entering}


def vector_of(build: Builder, vectors: ir.Value, layer: LayerSpec, *, first: int = 0) -> ir.Value:
    """[B,S,size] that a layer adds, of those of all layers from `first` on, [B,S,layers,size]."""
    return build.node("Gather", [vectors, np.int64(layer.index - first)], f"{layer.prefix}{VECTOR}", axis=2)


class _Stream:
    """What layers read on their way through the model.

    Attributes:
        values: hidden and vectors of all layers, where there are some; mask, cos and sin of each kind of attention.
        cut: those of them that an earlier stage has cut down to the last position.
    """

    def __init__(self, build: Builder, values: dict[str, ir.Value]) -> None:
        self.build, self.values = build, values
        self.made: dict[str, ir.Value] = {}  # keys and values of layers before, of the tokens of this run
        contract = build.contract
        self.cut = () if not contract.cut_in_front(build.graph_name, contract.first_layer) else ("hidden", "vectors")
        self.at_last = False
        self.first_vector = 0 if build.contract.embeds else build.contract.first_layer

    def of(self, layer: LayerSpec) -> dict[str, ir.Value]:
        """Inputs of a layer, by border name."""
        inputs = {"hidden": self.values["hidden"]}
        inputs |= {what: self.values[f"{what}.{layer.kind}"] for what in ("cos", "sin", "mask")}
        source = layer.keys_of
        for part in ("key", "value"):
            if layer.cache_from is not None:
                entering = self.build.inputs.get(f"{BORROWED}.{source}.{part}")
                inputs[f"shared.{part}"] = entering or self.made[f"{source}.{part}"]
            if self.build.graph_name == DECODE:
                inputs[f"past.{part}"] = self.build.inputs[f"past_key_values.{source}.{part}"]
        if layer.per_layer is not None:
            inputs[VECTOR] = vector_of(self.build, self.values["vectors"], layer, first=self.first_vector)
        return inputs

    def leave(self, layer: LayerSpec, result: dict[str, ir.Value]) -> None:
        """Take what a layer gives."""
        self.values["hidden"] = result["hidden"]
        self.made |= {f"{layer.index}.{part}": result[f"present.{part}"] for part, _ in layer.caches}

    def vectors_behind(self) -> dict[str, ir.Value]:
        """Vectors of the layers of later stages, as an output; nothing where layers add none."""
        if "vectors" not in self.values:
            return {}
        contract = self.build.contract
        done, end = contract.first_layer + contract.layers - self.first_vector, np.iinfo(np.int64).max
        constants = (np.array([number]) for number in (done, end, 2))
        return {LEAVING_VECTORS: self.build.node("Slice", [self.values["vectors"], *constants], LEAVING_VECTORS)}

    def keep_last(self) -> None:
        """Go on with the last position alone; a mask's rows are those of queries."""
        if self.at_last:
            return
        self.at_last = True
        for name, value in self.values.items():
            if name in self.cut:  # by an earlier stage
                continue
            at, to, axis = np.array([-1]), np.array([np.iinfo(np.int64).max]), [2 if name.startswith("mask.") else 1]
            self.values[name] = self.build.node("Slice", [value, at, to, np.array(axis)], f"{LAST_POSITION}.{name}")
