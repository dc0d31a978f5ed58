"""Pieces of a graph as sessions of their own: the nodes between some values, or some rows of one linear."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.tvm_vacc.contract import PartFolders
from gemma_deploy.backends.tvm_vacc.sessions import load_graph
from gemma_deploy.backends.tvm_vacc.strict import lower
from gemma_deploy.errors import ArtifactError
from gemma_deploy.graph.passes.unrounded import leave_unrounded
from gemma_deploy.names import LAST_POSITION, PER_LAYER_VECTORS, STREAMS
from gemma_deploy.runtime.session import VERIFY

POSITIONS = 128
MATRIX_BYTES = 24 << 20  # malloc maps and unmaps anything of 32 MiB: page faults
EMBEDDED, NORMED, LOGITS = "model.embed_tokens.out", "model.norm.out", "logits"
DECODE_INPUTS = ("attention_mask", "position_ids")
LAST_HIDDEN, LAST_VECTORS = f"{LAST_POSITION}.hidden", f"{LAST_POSITION}.vectors"
LAYER_OUT = re.compile(r"model\.layers\.(\d+)\.out")


def layer_input(layer: int, *, streams: bool) -> str:
    """Name of the value that a layer reads, of all positions; of several streams the first one reads what they are."""
    return f"model.layers.{layer - 1}.out" if layer else STREAMS if streams else EMBEDDED


@dataclass(frozen=True)
class Shared:
    """A value that a layer reads of another one's cache.

    Args:
        cache: name of the graph's port, `present.{i}.key` or `past_key_values.{i}.key`; of a rank's share, `part` of
            `parts` along the heads.
    """

    cache: str
    part: int = 0
    parts: int = 1

    @property
    def layer(self) -> int:
        """Whose cache it is."""
        return int(self.cache.split(".")[1])

    def of(self, whole: np.ndarray) -> np.ndarray:
        """The value, of the cache [B, Hk, positions, D]."""
        return np.split(whole, self.parts, axis=1)[self.part]


class Cutter:
    """Pieces of one graph as sessions.

    Args:
        folder: the artifact's directory; graph: `iter0` or `iter1`; stages: of a divided artifact, which is joined.
        rounding: round activations where the graph says so; without, linears read them as they are.
    """

    def __init__(self, folder: Path, graph: str, stages: PartFolders = (), *, rounding: bool = True) -> None:
        self.folder, self.model = folder, load_graph(folder / f"{graph}.onnx", stages)
        if not rounding:
            leave_unrounded(self.model, self.model.graph.opset_imports[""])
        self.where = str(folder / f"{graph}.onnx")
        self.values = {value.name: value for node in self.model.graph for value in node.outputs}
        self.values |= {value.name: value for value in self.model.graph.inputs}

    @property
    def layers(self) -> int:
        """How many there are."""
        found = (LAYER_OUT.fullmatch(str(name)) for name in self.values)
        return 1 + max((int(one[1]) for one in found if one), default=-1)

    @property
    def streams(self) -> bool:
        """Whether layers carry several streams along."""
        return STREAMS in self.values

    @functools.cached_property
    def at_last(self) -> dict[str, tuple[str, int]]:
        """Values cut down to the last position for the layers behind: name -> (of which value, axis of positions)."""
        found = {}
        for name in self.values:
            node = self.values[name].producer()
            if str(name).startswith(LAST_POSITION) and node is not None and node.inputs[0] is not None:
                found[str(name)] = _origin(node.inputs[0]), 2 if ".mask." in str(name) else 1
        return found

    @functools.cached_property
    def first_at_last(self) -> int | None:
        """The first layer that computes the last position alone; None where all compute every one."""
        whole = LAYER_OUT.fullmatch(self.at_last[LAST_HIDDEN][0]) if LAST_HIDDEN in self.at_last else None
        return None if whole is None else int(whole[1]) + 1

    @functools.cached_property
    def for_all_layers(self) -> set[str]:
        """Values that more than one layer reads."""
        return {"input_ids", *DECODE_INPUTS, PER_LAYER_VECTORS, *self.at_last} - {LAST_HIDDEN}

    def entering(self, layer: int) -> str:
        """Name of the value that a layer reads."""
        return LAST_HIDDEN if layer == self.first_at_last else layer_input(layer, streams=self.streams)

    def beside(self, layer: int) -> list[str]:
        """What layers read beside the stream and the caches: the vectors of tokens, where there are some."""
        first = self.first_at_last
        name = PER_LAYER_VECTORS if first is None or layer < first else LAST_VECTORS
        return [name] if name in self.values else []

    def shared(self, layer: int) -> dict[str, Shared]:
        """What a layer reads of the caches of others, by the names of values: as the graph has it, right or wrong."""
        stops = {self.entering(layer), *self.beside(layer), *DECODE_INPUTS}
        found: dict[str, Shared] = {}
        seen, stack = set[ir.Value](), [self.values[f"model.layers.{layer}.out"]]
        while stack:
            value = stack.pop()
            if value in seen or value.name in stops:
                continue
            seen.add(value)
            one = self._caches.get(str(value.name))
            if one is not None and one.layer != layer:
                found[str(value.name)] = one
            elif (node := value.producer()) is not None:
                stack += [each for each in node.inputs if each is not None]
        return found

    @functools.cached_property
    def _caches(self) -> dict[str, Shared]:
        """Which values are caches, or a rank's share of one."""
        past = (str(value.name) for value in self.model.graph.inputs)
        found = {name: Shared(name) for name in past if name.startswith("past_key_values.")}
        for value in (one for one in self.model.graph.outputs if str(one.name).startswith("present.")):
            node, shares = value.producer(), [value]
            if node is not None and node.op_type == "Concat":
                shares = [one for one in node.inputs if one is not None]
            for part, share in enumerate(shares):
                maker, own = share.producer(), Shared(str(value.name), part, len(shares))
                found[str(share.name)] = own
                if maker is not None and maker.op_type == "Identity" and maker.inputs[0] is not None:
                    found[str(maker.inputs[0].name)] = own
        return found

    def piece(self, inputs: Sequence[str], outputs: Sequence[str], rows: tuple[int, int, int] | None = None) -> Piece:
        """The nodes between some values.

        Args:
            rows: (first, stop, V): of matrices and scales with V rows take these rows only.

        Raises:
            ArtifactError: the graph has no such values, or needs others to compute the outputs.
        """
        try:
            graph = ir.convenience.extract(self.model.graph, list(inputs), list(outputs))
        except ValueError as error:
            raise ArtifactError(
                f"{', '.join(outputs)} cannot be computed from {', '.join(inputs)}: {error}",
                where=self.where,
                next_step=VERIFY,
            ) from error
        for value in graph.inputs:
            value.shape = None
        if rows is not None:
            _take_rows(graph, *rows)
        functions = list(self.model.functions.values())
        model = ir.Model(graph, ir_version=self.model.ir_version, functions=functions)
        return Piece(_open(model, self.folder), tuple(inputs), tuple(outputs))

    def linears(self, out: str) -> list[str]:
        """What the linear that makes `out` makes: itself, or every rank's share of it."""
        for share in (out, out.removesuffix(".out") + ".partial.out"):
            ranks: list[str] = []
            while (name := f"rank{len(ranks)}.{share}") in self.values:
                ranks.append(name)
            if ranks:
                return ranks
        return [out]

    def in_blocks(self, entering: str, leaving: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """A linear, a block of rows of its matrix after the other.

        Args:
            entering: the value it reads; leaving: the value it makes; arrays: [..., in] each.

        Returns:
            [..., out] for each array.
        """
        shape = self.values[leaving].shape
        if shape is None or not isinstance(shape[-1], int):
            raise ArtifactError(f"{leaving} has no fixed width", where=self.where, next_step=VERIFY)
        count, step = shape[-1], max(1, MATRIX_BYTES // (4 * arrays[0].shape[-1]))
        dtype = self.values[leaving].dtype
        made = [
            np.empty((*array.shape[:-1], count), dtype.numpy() if dtype is not None else np.float32) for array in arrays
        ]
        for start in range(0, count, step):
            stop = min(start + step, count)
            piece = self.piece([entering], [leaving], rows=(start, stop, count))
            for array, whole in zip(arrays, made, strict=True):
                whole[..., start:stop] = piece({entering: array})[0]
        return made

    def experts_inputs(self, out: str) -> list[str]:
        """What experts read, by the name of what they make: hidden states, weights, numbers of experts."""
        node = self.values[out].producer()
        assert node is not None  # a graph has no input of that name
        return [str(value.name) for value in node.inputs[:3] if value is not None]

    def experts(self, out: str, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """What experts make of hidden states, some of them after others: [B, S, H]."""
        names, node = self.experts_inputs(out), self.values[out].producer()
        matrices = node.inputs[3] if node is not None else None
        if matrices is None or matrices.shape is None:
            raise ArtifactError(f"{out} is not made by experts", where=self.where, next_step=VERIFY)
        count, rows, columns = matrices.shape.numpy()
        step = max(1, MATRIX_BYTES // (4 * rows * columns))
        x, weights, given = (feeds[name] for name in names)
        made = np.zeros(x.shape, x.dtype)
        for start in range(0, count, step):
            stop = min(start + step, count)
            own = np.where((given >= start) & (given < stop), given - start, stop - start)  # the last is none of them
            if (own < stop - start).any():
                piece = self.piece(names, [out], rows=(start, stop, count))
                made += piece(dict(zip(names, (x, weights, own), strict=True)))[0]
        return made

    def value(self, name: str) -> str:
        """Value name of `MODULE.out` (itself) or of `MODULE.in`, what a linear reads."""
        return self.linear_input(name.removesuffix(".in") + ".out") if name.endswith(".in") else name

    def linear_input(self, out: str) -> str:
        """What a linear reads, by the name of what it makes."""
        node = self.values[out].producer() if out in self.values else None
        if node is None or node.inputs[0] is None:
            raise ArtifactError(f"{out} is not made by a linear", where=self.where, next_step=VERIFY)
        return str(node.inputs[0].name)

    def logits_input(self) -> str:
        """What the LM head reads: the strided slice of the final norm in prefill, the norm itself in decode."""
        after = list(self.values[NORMED].consumers())
        for node in after:
            if node.op_type == "Slice":
                return str(node.outputs[0].name)
            if node.op_type == "Cast":  # to float16, before the choice is made
                after += node.outputs[0].consumers()
        return NORMED


def _origin(value: ir.Value) -> str:
    """The name under which a value is made that a stage gave to the next one."""
    node = value.producer()
    if node is None or node.op_type != "Identity" or node.inputs[0] is None:
        return str(value.name)
    return str(node.inputs[0].name)


class Piece:
    """A session with the names it was cut at."""

    def __init__(self, session: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self.session, self.inputs, self.outputs = session, inputs, outputs

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Values by name -> outputs in order."""
        return self.session.run(list(self.outputs), {name: feeds[name] for name in self.inputs})


def by_position(piece: Piece, feeds: Mapping[str, np.ndarray], spent: Sequence[str]) -> list[np.ndarray]:
    """Run a piece without attention on a few positions at a time: its operators' results are not all alive at once.

    A result of the shape and dtype of a `spent` value takes its place.
    """
    hidden = [name for name in piece.inputs if name not in DECODE_INPUTS]
    length = feeds[hidden[0]].shape[1]
    free = [feeds[name] for name in spent]
    results: list[np.ndarray] = []
    for start in range(0, length, POSITIONS):
        stop = min(start + POSITIONS, length)
        made = piece({**feeds, **{name: feeds[name][:, start:stop] for name in hidden}})
        if not start:
            results = [_place_for(value, length, free) for value in made]
        for result, value in zip(results, made, strict=True):
            result[:, start:stop] = value
    return results


def _place_for(value: np.ndarray, length: int, free: list[np.ndarray]) -> np.ndarray:
    """An array for [batch, length, ...] of which `value` is the beginning; one of `free` where it fits."""
    shape = (value.shape[0], length, *value.shape[2:])
    for at, array in enumerate(free):
        if array.shape == shape and array.dtype == value.dtype and array.flags.writeable:
            return free.pop(at)
    return np.empty(shape, value.dtype)


def _open(model: ir.Model, folder: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # it would keep the largest piece's memory
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    proto = ir.to_proto(lower(model)).SerializeToString()
    try:
        return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT's own have no common base
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"ONNX Runtime refuses it: {reason}", where=str(folder), next_step=VERIFY) from error


def _take_rows(graph: ir.Graph, start: int, stop: int, count: int) -> None:
    """Let every external initializer with `count` rows begin and end at others. In place; nothing is read."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or not tensor.shape or tensor.shape[0] != count:
            continue
        row_bytes = tensor.nbytes // count
        shape = ir.Shape([stop - start, *list(tensor.shape)[1:]])
        value.const_value = ir.ExternalTensor(
            tensor.location,
            (tensor.offset or 0) + start * row_bytes,
            (stop - start) * row_bytes,
            tensor.dtype,
            shape=shape,
            name=tensor.name,
            base_dir=tensor.base_dir,
        )
        value.shape = shape
    for node in graph:
        for value in node.outputs:
            value.shape = None  # was inferred for the whole matrix
