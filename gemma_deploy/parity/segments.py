"""The artifact's own graphs in ONNX Runtime, strict, a decoder layer at a time.

The graphs are cut where a layer's result is named `model.layers.{i}.out`. As the tokens are known beforehand, every
layer can run prefill and all decode steps before the next one is opened: one layer of weights in memory, read once,
instead of the whole model for every token. The pieces are the graph's own nodes and read the artifact's own
parameters; nothing is rebuilt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features
from gemma_deploy.runtime.contract import read_contract, read_manifest
from gemma_deploy.runtime.strict import lower

HEAD_BYTES = 128 << 20
EMBEDDED, NORMED, LOGITS = "model.embed_tokens.out", "model.norm.out", "logits"
DECODE_INPUTS = ("attention_mask", "position_ids")


class Cutter:
    """Pieces of one graph as sessions.

    Args:
        folder: the artifact's directory; graph: `iter0` or `iter1`.
    """

    def __init__(self, folder: Path, graph: str) -> None:
        self.folder, self.model = folder, ir.load(folder / f"{graph}.onnx")
        self.values = {value.name: value for node in self.model.graph for value in node.outputs}
        self.values |= {value.name: value for value in self.model.graph.inputs}

    def piece(
        self, inputs: Sequence[str], outputs: Sequence[str], rows: tuple[int, int, int] | None = None
    ) -> Piece:
        """The nodes between some values.

        Args:
            rows: (first, stop, V): of matrices and scales with V rows take these rows only.
        """
        graph = ir.convenience.extract(self.model.graph, list(inputs), list(outputs))
        for value in graph.inputs:
            value.shape = None
        if rows is not None:
            _take_rows(graph, *rows)
        functions = list(self.model.functions.values())
        model = ir.Model(graph, ir_version=self.model.ir_version, functions=functions)
        return Piece(_open(model, self.folder), tuple(inputs), tuple(outputs))

    def logits_input(self) -> str:
        """What the LM head reads: the strided slice of the final norm in prefill, the norm itself in decode."""
        normed = self.values[NORMED]
        for node in normed.consumers():
            if node.op_type == "Slice":
                return str(node.outputs[0].name)
        return NORMED


class Piece:
    """A session with the names it was cut at."""

    def __init__(self, session: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self.session, self.inputs, self.outputs = session, inputs, outputs

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Values by name -> outputs in order."""
        return self.session.run(list(self.outputs), {name: feeds[name] for name in self.inputs})


class CaseState:
    """One case on its way through the layers.

    Attributes:
        prefill: inputs of iter0 and the current hidden states [B, P, H] under the name of the value cut at.
        steps: the same for every decode step, [B, 1, H].
    """

    def __init__(self, case: Case, width: int, context: int) -> None:
        self.case, self.width = case, width
        batch = len(case.prompts)
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
        """A value of every row, [prompt + steps, features] float32, padding removed."""
        found = []
        for row, prompt in enumerate(self.case.prompts):
            parts = [_flat(self.prefill[name], row)[-len(prompt) :]]
            parts += [_flat(step[name], row) for step in self.steps if name in step]
            found.append(np.concatenate(parts).astype(np.float32))
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
        self.contract = read_contract(self.path, manifest if manifest is not None else read_manifest(self.path))
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
        return [state.rows(NORMED) for state in states]

    def start(self, case: Case) -> CaseState:
        """The inputs of a case as the runtime would feed them."""
        return CaseState(case, self.contract.prefill, self.contract.context)

    def embed(self, state: CaseState) -> None:
        """Input ids -> the first layer's input."""
        state.prefill[EMBEDDED] = self.graphs["iter0"].piece(["input_ids"], [EMBEDDED])(state.prefill)[0]
        piece = self.graphs["iter1"].piece(["input_ids"], [EMBEDDED])
        for step in state.steps:
            step[EMBEDDED] = piece(step)[0]

    def layer(self, layer: int, states: Sequence[CaseState], extra: Sequence[str] = ()) -> None:
        """One layer, prefill and every step, with a cache of its own.

        Args:
            extra: inner values to keep in the states as well.
        """
        entering, leaving = layer_input(layer), f"model.layers.{layer}.out"
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        outputs = list(dict.fromkeys([leaving, *present, *extra]))
        caches = []
        piece = self.graphs["iter0"].piece([entering, *DECODE_INPUTS], outputs)
        for state in states:
            made = dict(zip(outputs, piece(state.prefill), strict=True))
            cache = {}
            for name, port in zip(past, self.contract.caches[2 * layer : 2 * layer + 2], strict=True):
                cache[name] = np.zeros(port.shape, port.dtype)
                cache[name][:, :, : state.width] = made[name.replace("past_key_values", "present")]
            caches.append(cache)
            self._keep(state.prefill, made, entering, (leaving, *extra))
        piece = self.graphs["iter1"].piece([entering, *DECODE_INPUTS, *past], outputs)
        for state, cache in zip(states, caches, strict=True):
            for step, feeds in enumerate(state.steps):
                made = dict(zip(outputs, piece({**feeds, **cache}), strict=True))
                for name in past:
                    cache[name][:, :, state.width + step] = made[name.replace("past_key_values", "present")][:, :, 0]
                self._keep(feeds, made, entering, (leaving, *extra))

    def finish(self, states: Sequence[CaseState]) -> None:
        """The final norm, with the prefill graph's own choice of the last position."""
        last = layer_input(self.layers)
        cutter = self.graphs["iter0"]
        chosen = cutter.logits_input()
        outputs = list(dict.fromkeys([NORMED, chosen]))
        piece, step_piece = cutter.piece([last], outputs), self.graphs["iter1"].piece([last], [NORMED])
        for state in states:
            made = piece(state.prefill)
            state.prefill[NORMED] = made[0].copy()
            state.prefill[NORMED][:, -1:] = made[-1][:, -1:]  # what the LM head gets, should it differ
            for step in state.steps:
                step[NORMED] = step_piece(step)[0]

    def head(self, features: np.ndarray) -> np.ndarray:
        """features: [n, H] -> [n, V]: the decode graph's LM head, a block of rows of its matrix at a time."""
        cutter = self.graphs["iter1"]
        vocab, hidden = self.contract.vocab_size, features.shape[1]
        step = max(1, HEAD_BYTES // (4 * hidden))
        dtype = cutter.values[NORMED].dtype
        entering = features[None].astype(dtype.numpy() if dtype is not None else np.float32)
        logits = np.empty((len(features), vocab), np.float32)
        for start in range(0, vocab, step):
            stop = min(start + step, vocab)
            piece = cutter.piece([NORMED], [LOGITS], rows=(start, stop, vocab))
            logits[:, start:stop] = piece({NORMED: entering})[0][0]
        return logits

    @staticmethod
    def _keep(
        state: dict[str, np.ndarray], made: Mapping[str, np.ndarray], entering: str, names: Sequence[str]
    ) -> None:
        """Put results into the state; the layer's input is not needed again."""
        state.pop(entering, None)
        state.update({name: made[name] for name in names})


def _open(model: ir.Model, folder: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # it would keep the largest piece's memory
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    proto = ir.to_proto(lower(model)).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def layer_input(layer: int) -> str:
    """Name of the value that a layer reads."""
    return EMBEDDED if layer == 0 else f"model.layers.{layer - 1}.out"


def _flat(value: np.ndarray, row: int) -> np.ndarray:
    """[B, positions, ...] or [B, heads, positions, D] -> [positions, features] of one row."""
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
