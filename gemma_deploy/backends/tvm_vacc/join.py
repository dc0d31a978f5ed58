"""The graphs of a divided artifact as one graph: ranks side by side, stages behind one another.

`Vastai::AllReduce` becomes Sum over the ranks, `AllGather` Concat; a stage's hidden_states are the next one's
inputs_embeds, and its present keys and values the shared ones of every later stage that reads them. Nodes and
parameters are the parts' own. What every rank computes from the same values is computed once; what differs is named
`rank0.`, `rank1.`, ... So the joined graph gives on one machine what the parts give on many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from gemma_deploy.backends.tvm_vacc.contract import PartFolders
from gemma_deploy.errors import ArtifactError
from gemma_deploy.graph.contract import (
    BORROWED,
    ENTERING,
    ENTERING_VECTORS,
    LEAVING,
    LEAVING_VECTORS,
    PAST_CACHE,
    PRESENT,
)
from gemma_deploy.names import FIRST_ROW
from gemma_deploy.partition.ranks import sharding
from gemma_deploy.runtime.session import load_file

COLLECTIVES = {"AllReduce", "AllGather"}
PASSED = {LEAVING: ENTERING, LEAVING_VECTORS: ENTERING_VECTORS}  # from a stage to the next one
REBUILD = "compile the artifact again with --force"


class _Joiner:
    def __init__(self, root: Path, name: str, whole: bool) -> None:
        self.root, self.name, self.whole = root, name, whole
        self.nodes: list[ir.Node] = []
        self.inputs: dict[str, ir.Value] = {}
        self.shares: dict[str, list[ir.Value]] = {}  # of the ranks, of a whole cache
        self.presents: dict[str, list[ir.Value]] = {}  # of each rank, by the names of those who read them
        self.outputs: dict[str, ir.Value] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.names: set[str] = set()
        self.node_names: set[str] = set()
        self.functions: dict[ir.OperatorIdentifier, ir.Function] = {}
        self.opsets: dict[str, int] = {}

    def add(
        self, folders: Sequence[str], models: Sequence[ir.Model], entering: Mapping[str, ir.Value]
    ) -> dict[str, ir.Value]:
        """Add a stage's ranks; returns what leaves it for the next one, by the names of that one's inputs.

        Args:
            entering: what left the stage before.
        """
        self._refuse_different(folders, models)
        maps: list[dict[ir.Value, ir.Value]] = [{} for _ in models]
        for ports in zip(*(model.graph.inputs for model in models), strict=True):
            self._input(ports, maps, entering)
        for values in zip(*(model.graph.initializers.values() for model in models), strict=True):
            self._initializer(folders, values, maps)
        for nodes in zip(*(model.graph for model in models), strict=True):
            self._node(nodes, maps)
        leaving = dict[str, ir.Value]()
        for outs in zip(*(model.graph.outputs for model in models), strict=True):
            made = [each[value] for value, each in zip(outs, maps, strict=True)]
            name = str(outs[0].name)
            if name in PASSED:
                leaving[PASSED[name]] = made[0]
                if self.whole:
                    continue
            if name.startswith(f"{PRESENT}."):
                self.presents[f"{BORROWED}{name.removeprefix(PRESENT)}"] = made
            self.outputs[name] = self._output(outs[0], made)
        for model in models:
            self.functions.update(model.functions)
            self.opsets.update(model.graph.opset_imports)
        return leaving

    def _refuse_different(self, folders: Sequence[str], models: Sequence[ir.Model]) -> None:
        kinds = [[(node.domain, node.op_type) for node in model.graph] for model in models]
        names = [list(model.graph.initializers) for model in models]
        if any(kind != kinds[0] for kind in kinds) or any(name != names[0] for name in names):
            raise ArtifactError(
                f"{self.name}.onnx of the ranks differ in more than their parameters",
                where=", ".join(str(self.root / folder) for folder in folders),
                next_step=REBUILD,
            )

    def _input(
        self, ports: Sequence[ir.Value], maps: list[dict[ir.Value, ir.Value]], entering: Mapping[str, ir.Value]
    ) -> None:
        name = str(ports[0].name)
        if self.whole and (name in PASSED.values() or name.startswith(f"{BORROWED}.")):
            given = [entering[name]] * len(ports) if name in entering else self.presents.get(name, [])
            if len(given) != len(ports):
                raise ArtifactError(
                    f"a stage takes {name}, which none before it gives", where=str(self.root), next_step=REBUILD
                )
            values = given
        elif name.startswith((f"{PAST_CACHE}.", f"{BORROWED}.")) and len(ports) > 1:
            if name not in self.shares:
                batch, heads, length, size = _dims(ports[0])
                whole = self._whole_input(ports[0], (batch, int(heads) * len(ports), length, size))
                self.shares[name] = self._split(whole, ports)
            values = self.shares[name]
        else:
            values = [self.inputs.get(name) or self._whole_input(ports[0], _dims(ports[0]))] * len(ports)
        for port, value, each in zip(ports, values, maps, strict=True):
            each[port] = value

    def _whole_input(self, port: ir.Value, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=port.name, type=port.type, shape=ir.Shape(shape))
        self.inputs[str(port.name)] = value
        self.names.add(str(port.name))
        return value

    def _split(self, whole: ir.Value, ports: Sequence[ir.Value]) -> list[ir.Value]:
        """The ranks' KV heads of a whole cache."""
        node = ir.node(
            "Split", [whole], {"axis": 1, "num_outputs": len(ports)}, num_outputs=len(ports), name=f"{whole.name}.split"
        )
        for rank, (value, port) in enumerate(zip(node.outputs, ports, strict=True)):
            value.name, value.type, value.shape = f"rank{rank}.{port.name}", port.type, port.shape
        self.nodes.append(node)
        return list(node.outputs)

    def _initializer(
        self, folders: Sequence[str], values: Sequence[ir.Value], maps: list[dict[ir.Value, ir.Value]]
    ) -> None:
        name = str(values[0].name)
        divided = sharding(name, len(values[0].shape or ())) is not None
        own = len(values) > 1 and (divided or name.endswith(FIRST_ROW))
        made: ir.Value | None = None
        for rank, (folder, value, each) in enumerate(zip(folders, values, maps, strict=True)):
            if made is None or own:
                made = ir.Value(
                    name=self._free(f"rank{rank}.{name}" if own else name), type=value.type, shape=value.shape
                )
                made.const_value = self._tensor(value, folder)
                self.initializers[str(made.name)] = made
            each[value] = made

    def _tensor(self, value: ir.Value, folder: str) -> ir.TensorProtocol | None:
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        location = f"{folder}/{tensor.location}" if folder else str(tensor.location)
        return ir.ExternalTensor(
            location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(value.name),
            base_dir=self.root,
        )  # fmt: skip

    def _node(self, nodes: Sequence[ir.Node], maps: list[dict[ir.Value, ir.Value]]) -> None:
        inputs = [
            [None if value is None else each[value] for value in node.inputs]
            for node, each in zip(nodes, maps, strict=True)
        ]
        first = nodes[0]
        if first.domain == "Vastai" and first.op_type in COLLECTIVES:
            self._collective(nodes, [values[0] for values in inputs], maps)
        elif all(values == inputs[0] for values in inputs):
            copy = self._copy(first, inputs[0], "")
            for node, each in zip(nodes, maps, strict=True):
                each.update(zip(node.outputs, copy.outputs, strict=True))
        else:
            for rank, (node, values, each) in enumerate(zip(nodes, inputs, maps, strict=True)):
                copy = self._copy(node, values, f"rank{rank}.")
                each.update(zip(node.outputs, copy.outputs, strict=True))

    def _collective(
        self, nodes: Sequence[ir.Node], values: Sequence[ir.Value | None], maps: list[dict[ir.Value, ir.Value]]
    ) -> None:
        node = nodes[0]
        if node.op_type == "AllReduce":
            new = ir.node("Sum", values)
        else:
            new = ir.node("Concat", values, {"axis": node.attributes["axis"].as_int()})
            for rank, value in enumerate(values):
                assert value is not None
                value.name = self._free(f"rank{rank}.logits")  # nothing else is gathered
        self._name(new, node, "")
        self.nodes.append(new)
        for one, each in zip(nodes, maps, strict=True):
            each[one.outputs[0]] = new.outputs[0]

    def _copy(self, node: ir.Node, inputs: Sequence[ir.Value | None], prefix: str) -> ir.Node:
        copy = ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs)
        )  # fmt: skip
        self._name(copy, node, prefix)
        self.nodes.append(copy)
        return copy

    def _name(self, new: ir.Node, old: ir.Node, prefix: str) -> None:
        new.name = _unused(f"{prefix}{old.name}", self.node_names)
        for value, before in zip(new.outputs, old.outputs, strict=True):
            value.name = self._free(f"{prefix}{before.name}")
            value.type, value.shape = before.type, before.shape

    def _free(self, name: str) -> str:
        return _unused(name, self.names)

    def _output(self, port: ir.Value, values: Sequence[ir.Value]) -> ir.Value:
        """Logits as they are; present keys and values of all ranks behind one another."""
        name = str(port.name)
        if len(values) == 1 or not name.startswith("present."):
            values[0].name = name
            return values[0]
        node = ir.node("Concat", values, {"axis": 1}, name=f"{name}.join")
        batch, heads, length, size = _dims(port)
        made = node.outputs[0]
        made.name, made.type = name, port.type
        made.shape = ir.Shape((batch, int(heads) * len(values), length, size))
        self.nodes.append(node)
        return made

    def model(self) -> ir.Model:
        """The joined graph; caches are inputs and outputs in the order of layers, as those of an undivided one."""
        graph = ir.Graph(
            list(self.inputs.values()),
            sorted(self.outputs.values(), key=lambda value: value.name != "logits"),
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=self.opsets,
            name=self.name,
        )
        return ir.Model(graph, ir_version=10, functions=list(self.functions.values()))


def join(root: Path, name: str, stages: PartFolders, *, whole: bool = True) -> ir.Model:
    """Load and join the parts' graphs called `name` (`iter0`, `iter1`).

    Args:
        whole: all stages, from tokens to logits; else one of them, which takes and gives what stages pass on.

    Raises:
        ArtifactError: a file is missing or damaged, or the parts do not belong together.
    """
    joiner = _Joiner(root, name, whole)
    passed: dict[str, ir.Value] = {}
    for folders in stages:
        models = [load_file(root / folder / f"{name}.onnx") for folder in folders]
        passed = joiner.add(folders, models, passed)
    if whole and (passed or "logits" not in joiner.outputs):
        raise ArtifactError("the last stage gives no logits", where=str(root), next_step=REBUILD)
    return joiner.model()


def _unused(name: str, names: set[str]) -> str:
    """The name, with a number where it is taken: every stage has a prologue of its own."""
    free, number = name, 1
    while free in names:
        number += 1
        free = f"{name}.{number}"
    names.add(free)
    return free


def _dims(value: ir.Value) -> list[int | str]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
