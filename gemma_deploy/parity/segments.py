"""The artifact's own graphs in ONNX Runtime, strict, a decoder layer at a time.

The graphs are cut where a layer's result is named `model.layers.{i}.out`. As the tokens are known beforehand, every
layer can run prefill and all decode steps before the next one is opened: its weights are read once, and not the whole
model for every token. The layer is cut again around its linears, so that one matrix is in memory at a time and is
dequantized once and not once a token. The pieces are the graph's own nodes and read the artifact's own parameters;
nothing is rebuilt. Differs from running the whole graph in the number of rows of a decode GEMM only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gemma_deploy.errors import ArtifactError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.runtime.contract import StaticContract, read_contract, read_manifest
from gemma_deploy.runtime.session import VERIFY, load_graph
from gemma_deploy.runtime.strict import lower

POSITIONS = 128
MATRIX_BYTES = 24 << 20  # malloc maps and unmaps anything of 32 MiB: page faults
EMBEDDED, NORMED, LOGITS = "model.embed_tokens.out", "model.norm.out", "logits"
CHOSEN = "lm_head.in"  # what the LM head reads: in prefill a slice of the final norm
# The linears of a layer in the order they depend on each other.
LEVELS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
ONLY_FOR_DOWN = ("mlp.gate_proj.out", "mlp.up_proj.out")  # the widest values there are; dropped early
DECODE_INPUTS = ("attention_mask", "position_ids")


class Cutter:
    """Pieces of one graph as sessions.

    Args:
        folder: the artifact's directory; graph: `iter0` or `iter1`.
    """

    def __init__(self, folder: Path, graph: str) -> None:
        self.folder, self.model = folder, load_graph(folder / f"{graph}.onnx")
        self.where = str(folder / f"{graph}.onnx")
        self.values = {value.name: value for node in self.model.graph for value in node.outputs}
        self.values |= {value.name: value for value in self.model.graph.inputs}

    def piece(
        self, inputs: Sequence[str], outputs: Sequence[str], rows: tuple[int, int, int] | None = None
    ) -> Piece:
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
                f"{', '.join(outputs)} cannot be computed from {', '.join(inputs)}: {error}", where=self.where
            ) from error
        for value in graph.inputs:
            value.shape = None
        if rows is not None:
            _take_rows(graph, *rows)
        functions = list(self.model.functions.values())
        model = ir.Model(graph, ir_version=self.model.ir_version, functions=functions)
        return Piece(_open(model, self.folder), tuple(inputs), tuple(outputs))

    def in_blocks(self, entering: str, leaving: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """A linear, a block of rows of its matrix after the other.

        Args:
            entering: the value it reads; leaving: the value it makes; arrays: [..., in] each.

        Returns:
            [..., out] for each array.
        """
        shape = self.values[leaving].shape
        if shape is None or not isinstance(shape[-1], int):
            raise ArtifactError(f"{leaving} has no fixed width", where=self.where)
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

    def value(self, name: str) -> str:
        """Value name of `MODULE.out` (itself) or of `MODULE.in`, what a linear reads."""
        return self.linear_input(name.removesuffix(".in") + ".out") if name.endswith(".in") else name

    def linear_input(self, out: str) -> str:
        """What a linear reads, by the name of what it makes."""
        node = self.values[out].producer() if out in self.values else None
        if node is None or node.inputs[0] is None:
            raise ArtifactError(f"{out} is not made by a linear", where=self.where)
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


class Piece:
    """A session with the names it was cut at."""

    def __init__(self, session: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self.session, self.inputs, self.outputs = session, inputs, outputs

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Values by name -> outputs in order."""
        return self.session.run(list(self.outputs), {name: feeds[name] for name in self.inputs})


@dataclass(frozen=True)
class Run:
    """One execution of a layer: the values it has so far, and in decode the cache and the slot that is written."""

    feeds: dict[str, np.ndarray]
    cache: dict[str, np.ndarray] | None = None
    slot: int = 0


class CaseState:
    """One case on its way through the layers.

    Attributes:
        prefill: inputs of iter0 and the current hidden states [B, P, H] under the name of the value cut at.
        steps: the same for every decode step, [B, 1, H].
    """

    def __init__(self, case: Case, contract: StaticContract, rescaling: Rescaling) -> None:
        self.case, self.contract, self.rescaling = case, contract, rescaling
        batch, width, context = len(case.prompts), contract.prefill, contract.context
        ids, mask, positions = (np.zeros((batch, width), np.int64) for _ in range(3))
        for row, prompt in enumerate(case.prompts):
            start = width - len(prompt)
            ids[row, start:], mask[row, start:], positions[row, start:] = prompt, 1, np.arange(len(prompt))
        self.prefill = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        self.steps = []
        for step in range(case.steps):
            seen = np.zeros((batch, context + 1), np.int64)
            seen[:, :width], seen[:, width : width + step], seen[:, -1] = mask, 1, 1
            self.steps.append(
                {
                    "input_ids": np.array([[row[step]] for row in case.forced], np.int64),
                    "attention_mask": seen,
                    "position_ids": np.array([[len(prompt) + step] for prompt in case.prompts], np.int64),
                }
            )

    def rows(self, name: str) -> list[np.ndarray]:
        """A value of every row, [prompt + steps, features] float32, padding removed and rescaling undone."""
        found, scale = [], np.float32(2.0 ** self.rescaling.of(name))
        for row, prompt in enumerate(self.case.prompts):
            parts = [_flat(self.prefill[name], row)[-len(prompt) :]]
            parts += [_flat(step[name], row) for step in self.steps if name in step]
            found.append(np.concatenate(parts).astype(np.float32) * scale)
        return found


class StrictSource:
    """The artifact, computed to the letter.

    Args:
        path: the artifact's directory, finished or not.
        manifest: of an artifact that is not finished.
    """

    name = "strict"

    def __init__(self, path: Path, manifest: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path).resolve()
        manifest = manifest if manifest is not None else read_manifest(self.path)
        self.contract = read_contract(self.path, manifest)
        self.rescaling = Rescaling.of_manifest(manifest or {})
        self.graphs = {graph: Cutter(self.path, graph) for graph in ("iter0", "iter1")}
        self.layers = len(self.contract.caches) // 2

    def run(self, cases: Sequence[Case]) -> Features:
        """Hidden states after the final norm, [prompt + steps, H] of every row."""
        states = [self.start(case) for case in cases]
        for state in states:
            self.embed(state)
        for layer in range(self.layers):
            self.layer(layer, states)
        self.finish(states)
        return [state.rows(CHOSEN) for state in states]

    def start(self, case: Case) -> CaseState:
        """The inputs of a case as the runtime would feed them."""
        contract = self.contract
        if contract.dynamic:
            width = max(map(len, case.prompts))
            contract = contract.sized(len(case.prompts), width, width + case.steps)
        return CaseState(case, contract, self.rescaling)

    def embed(self, state: CaseState) -> None:
        """Input ids -> the first layer's input."""
        state.prefill[EMBEDDED] = self.graphs["iter0"].piece(["input_ids"], [EMBEDDED])(state.prefill)[0]
        piece = self.graphs["iter1"].piece(["input_ids"], [EMBEDDED])
        for step in state.steps:
            step[EMBEDDED] = piece(step)[0]

    def layer(self, layer: int, states: Sequence[CaseState], extra: Sequence[str] = ()) -> None:
        """One layer, prefill and every step, with a cache of its own.

        Args:
            extra: inner values to keep in the states as well, `MODULE.out` or `MODULE.in`.
        """
        kept = (f"model.layers.{layer}.out", *extra)
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        for state in states:  # one at a time: the values of P positions are wide
            self._through("iter0", layer, [Run(state.prefill)], (*kept, *present))
        steps = []
        for state in states:
            cache = {}
            width = state.contract.prefill
            for name, port in zip(present, state.contract.caches[2 * layer : 2 * layer + 2], strict=True):
                cache[port.name] = np.zeros([int(dim) for dim in port.shape], port.dtype)
                cache[port.name][:, :, :width] = state.prefill.pop(name)
            steps += [Run(feeds, cache, width + i) for i, feeds in enumerate(state.steps)]
        self._through("iter1", layer, steps, kept)

    def _through(self, graph: str, layer: int, runs: Sequence[Run], kept: Sequence[str]) -> None:
        """Take runs through a layer, cut around its linears; of the values made, only `kept` remain."""
        if not runs:
            return
        cutter = self.graphs[graph]
        known = [layer_input(layer), *DECODE_INPUTS]
        values = {name: cutter.value(name) for name in kept}
        for level in LEVELS:
            linears = [f"model.layers.{layer}.{name}.out" for name in level]
            inputs = [cutter.linear_input(linear) for linear in linears]
            _between(cutter, layer, known, inputs, runs, attends="self_attn.o_proj" in level)
            for name in [name for name in known if name.endswith(ONLY_FOR_DOWN) and name not in values.values()]:
                if "mlp.down_proj" in level:
                    known.remove(name)
                    for run in runs:
                        del run.feeds[name]
            for name, linear in zip(inputs, linears, strict=True):
                _apply(cutter, name, linear, runs, together=graph == "iter1")
            known += linears
        _between(cutter, layer, known, list(values.values()), runs, attends=True)
        for run in runs:
            results = {name: run.feeds[value] for name, value in values.items()}
            for name in set(run.feeds) - {"input_ids", *DECODE_INPUTS}:
                del run.feeds[name]
            run.feeds.update(results)
        give_memory_back()

    def finish(self, states: Sequence[CaseState]) -> None:
        """The final norm, with the prefill graph's own choice of the last position."""
        last = layer_input(self.layers)
        cutter = self.graphs["iter0"]
        chosen = cutter.logits_input()
        outputs = list(dict.fromkeys([NORMED, chosen]))
        piece, step_piece = cutter.piece([last], outputs), self.graphs["iter1"].piece([last], [NORMED])
        for state in states:
            made = piece(state.prefill)
            state.prefill[NORMED], state.prefill[CHOSEN] = made[0], made[0].copy()
            state.prefill[CHOSEN][:, -1:] = made[-1][:, -1:]
            for step in state.steps:
                step[NORMED] = step[CHOSEN] = step_piece(step)[0]

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, H] -> [n, V]: the LM head of the graph that makes them, in blocks of the vocabulary."""
        cutter = self.graphs["iter0" if prompt_end else "iter1"]
        entering_name = cutter.logits_input()
        dtype = cutter.values[entering_name].dtype
        entering = features[None].astype(dtype.numpy() if dtype is not None else np.float32)
        return cutter.in_blocks(entering_name, LOGITS, [entering])[0][0]


def _apply(cutter: Cutter, name: str, linear: str, runs: Sequence[Run], together: bool) -> None:
    """Run a linear, on all rows of all runs together or on one run after the other."""
    entering = [run.feeds[name] for run in runs]
    if not together:
        made = cutter.in_blocks(name, linear, entering)
    else:
        made = np.split(cutter.in_blocks(name, linear, [np.concatenate(entering)])[0], len(runs))
    for run, value in zip(runs, made, strict=True):
        run.feeds[linear] = value


def _between(
    cutter: Cutter, layer: int, known: Sequence[str], wanted: Sequence[str], runs: Sequence[Run], attends: bool
) -> None:
    """Compute values from known ones; where a run has a cache, its new keys and values are written there."""
    wanted = [name for name in dict.fromkeys(wanted) if name not in known]
    if not wanted:
        return
    cached = attends and runs[0].cache is not None
    past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")] if cached else []
    present = [name.replace("past_key_values", "present") for name in past]
    outputs = list(dict.fromkeys([*wanted, *present]))
    piece = cutter.piece([*known, *past], outputs)
    for run in runs:
        values = piece({**run.feeds, **(run.cache or {})}) if attends else _by_position(piece, run.feeds)
        made = dict(zip(outputs, values, strict=True))
        run.feeds.update({name: made[name] for name in wanted})
        for name, new in zip(past, present, strict=True):
            assert run.cache is not None
            run.cache[name][:, :, run.slot] = made[new][:, :, 0]


def _by_position(piece: Piece, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a piece without attention on a few positions at a time: its operators' results are not all alive at once."""
    hidden = [name for name in piece.inputs if name not in DECODE_INPUTS]
    length = feeds[hidden[0]].shape[1]
    parts = []
    for start in range(0, length, POSITIONS):
        part = {name: feeds[name][:, start : start + POSITIONS] for name in hidden}
        parts.append(piece({**feeds, **part}))
    return [np.concatenate(values, axis=1) for values in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]


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


def layer_input(layer: int) -> str:
    """Name of the value that a layer reads."""
    return EMBEDDED if layer == 0 else f"model.layers.{layer - 1}.out"


def _flat(value: np.ndarray, row: int) -> np.ndarray:
    """[B, positions, features] or [B, heads, positions, D] -> [positions, features] of one row."""
    if value.ndim == 4:
        value = np.swapaxes(value, 1, 2)
    return value[row].reshape(value.shape[1], -1)


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
