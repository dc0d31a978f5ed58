"""An artifact of ONNX Runtime's back end as a source: `exact` on dequantized weights, or with the kernels it ships.

What leaves the final norm is kept, of every position, and the head is applied when logits are compared. Nothing is
rebuilt: exact.py says how the graph is taken apart. The whole graph as a user runs it, choice of the last token
included, is `whole_logits`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from gemma_deploy.artifact.manifest import KernelsRecord
from gemma_deploy.backends.onnxruntime.decoder import LOGITS, NORMED
from gemma_deploy.backends.onnxruntime.exact import drop_unread, every_position, exact
from gemma_deploy.backends.onnxruntime.linears import product_of
from gemma_deploy.backends.onnxruntime.options import ALL, GRAPH, LAST
from gemma_deploy.backends.onnxruntime.window import empty_caches, windows_of
from gemma_deploy.machine import give_memory_back
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.gates import Line
from gemma_deploy.parity.sources import Features
from gemma_deploy.progress import Tick
from gemma_deploy.runtime.session import load_file, open_graph

# Operators whose first output has the type of their first input.
SAME_TYPE = (
    "FusedMatMul", "RMSNormalization", "SkipSimplifiedLayerNormalization", "Reshape", "Gelu", "Mul", "Add", "GatherND",
    "Gather", "Concat", "Tanh", "Slice", "Unsqueeze", "Squeeze", "MatMul", "Sub", "Div", "Max", "Sqrt",
    "ReduceMean", "Relu",
)  # fmt: skip
Kernels = Literal["strict", "shipped"]
STRICT: Kernels = "strict"
SHIPPED: Kernels = "shipped"
# One row of the head alone and among others: MatMulNBits adds in another order (real 270M: 5e-7).
WHOLE_LIMIT = 1e-5
WHOLE_BYTES = 64 << 20  # of logits of all positions that are compared
Caches = dict[str, np.ndarray]  # by the names of the graph's inputs


@dataclass(frozen=True)
class _State:
    """Caches, and the tokens that were read into them, which a cache of a window alone does not say."""

    length: int
    caches: Caches


class DynamicSource:
    """The artifact's graph in ONNX Runtime, a row at a time.

    Args:
        path: the artifact's directory.
        kernels: `strict` puts float32 products on dequantized weights in the place of kernels; `shipped` leaves them.
        watched: inner values to hand over, `MODULE.out`, for the search of a difference.
        adapter: float32 matrices of an adapter, by input of the graph.
    """

    def __init__(
        self,
        path: Path,
        kernels: Kernels = STRICT,
        watched: Sequence[str] = (),
        *,
        adapter: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.name: str = kernels
        self.path, self.kernels = Path(path).resolve(), kernels
        self.watched, self.adapter = watched, dict(adapter or {})
        self.values: dict[str, list[np.ndarray]] = {}
        self._head: Any = None
        self.progress: Tick | None = None
        self.unit = "sequences"

    def run(self, cases: Sequence[Case]) -> Features:
        """Hidden states after the final norm, [prompt + steps, H] of every row."""
        prompts = [prompt for case in cases for prompt in case.prompts]
        forced = [row for case in cases for row in case.forced]
        session = self._open()
        made = [session.run(prompt) for prompt in prompts]
        hidden, states = [one for one, _ in made], [state for _, state in made]
        for row, tokens in enumerate(forced):
            # Exact kernels give the same for tokens together; those that round are run as they will be.
            together = max(1, len(tokens)) if self.kernels == STRICT else 1
            for at in range(0, len(tokens), together):
                new, states[row] = session.run(tokens[at : at + together], states[row])
                hidden[row] = np.concatenate([hidden[row], new])
            if self.progress is not None:
                self.progress(row + 1, len(forced))
        del session, made
        give_memory_back()
        rows = iter(hidden)
        return [[next(rows) for _ in case.prompts] for case in cases]

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, H] -> [n, V]."""
        rows = np.ascontiguousarray(features[None], np.float32)
        if self._head is None:
            model = self._graph()
            graph = ir.convenience.extract(model.graph, [NORMED], [LOGITS])
            graph.inputs[0].shape = None
            whole = ir.Model(graph, ir_version=model.ir_version)
            self._head = open_graph(whole, self.path, strict=self.kernels == STRICT)
        logits: np.ndarray = self._head.run([LOGITS], {NORMED: rows})[0][0]
        return logits

    def _graph(self) -> ir.Model:
        model = load_file(self.path / GRAPH)
        every_position(model)
        if self.kernels == STRICT:
            exact(model)
        for value in (value for node in model.graph for value in node.outputs if value.name == NORMED):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        return model

    def _open(self) -> _Session:
        model = self._graph()
        graph = model.graph
        made = {value.name: value for node in graph for value in node.outputs}
        names = {name: made[name] for name in (NORMED, *self.watched) if name in made}
        outputs = [value for value in graph.outputs if value.name != LOGITS]
        graph.outputs.clear()
        graph.outputs.extend([*names.values(), *outputs])
        drop_unread(graph)  # ONNX Runtime would compute the head of every position, and nobody reads it
        for value in names.values():
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        session = open_graph(model, self.path, strict=self.kernels == STRICT)
        empty = empty_caches(session, windows_of(graph))
        return _Session(
            session,
            [str(value.name) for value in names.values()],
            list(names),
            empty=empty,
            values=self.values,
            adapter=self.adapter,
        )


class _Session:
    """A session and its caches before the first token.

    Args:
        names: values to fetch, the final norm's first; known_as: what the caller calls them.
        values: gets those after the first, a piece for each call.
        adapter: see `DynamicSource`.
    """

    def __init__(
        self,
        session: Any,
        names: Sequence[str],
        known_as: Sequence[str],
        *,
        empty: Caches,
        values: dict[str, list[np.ndarray]],
        adapter: Caches,
    ) -> None:
        self.adapter = adapter
        self.session, self.names, self.known_as, self.empty, self.values = session, list(names), known_as, empty, values

    def run(self, tokens: Sequence[int], before: _State | None = None) -> tuple[np.ndarray, _State]:
        """New tokens behind what was read before -> [tokens, H] and the caches after them."""
        before = before or _State(0, self.empty)
        total = before.length + len(tokens)
        feeds = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, total), np.int64)}
        present = [name.replace("past_key_values", "present") for name in before.caches]
        results = self.session.run([*self.names, *present], feeds | before.caches | self.adapter)
        kept = results[: len(self.names)]
        for name, value in zip(self.known_as[1:], kept[1:], strict=True):
            self.values.setdefault(name, []).append(value.reshape(len(tokens), -1))
        return kept[0][0], _State(total, dict(zip(before.caches, results[len(self.names) :], strict=True)))


def whole_logits(path: Path, tokens: Sequence[int], adapter: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """Logits [1,V] after a prompt, or [S,V] of all its tokens, as the graph gives them; nothing of it is changed."""
    model = load_file(Path(path) / GRAPH)
    windows, session = windows_of(model.graph), open_graph(model, Path(path).resolve(), strict=False)
    feeds = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, len(tokens)), np.int64)}
    feeds |= empty_caches(session, windows) | dict(adapter or {})
    logits: np.ndarray = session.run([LOGITS], feeds)[0][0]
    return logits


def whole_graph_line(path: Path, shipped: DynamicSource, case: Case, *, vocab_size: int, logits: str = LAST) -> Line:
    """The graph untouched gives what its parts give: of the last token, or of every one in its own place.

    Args:
        logits: which of them the graph gives; of all, as many tokens are compared as fit into `WHOLE_BYTES`.
    """
    prompt, where = case.prompts[0], "after a prompt"
    if logits == ALL:
        prompt, where = prompt[: max(2, WHOLE_BYTES // (4 * vocab_size))], "for every token of a prompt"
    parts = shipped.run([Case(case.name, (prompt,), ((),))])[0][0]
    found = whole_logits(path, prompt, shipped.adapter)
    expected = shipped.head(parts if logits == ALL else parts[-1:])
    error = largest_error(found, expected)
    return Line(f"shipped = its parts {where}", "relative error", error, WHOLE_LIMIT, error <= WHOLE_LIMIT)


def largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of any logit [N,V], relative to the largest; infinite where there are more or fewer."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max()))


def line_of_14_bits(path: Path, kernels: KernelsRecord) -> Line:
    """Which linears of integer products have 14-bit activations, by the graph and by the manifest."""
    graph = load_file(Path(path) / GRAPH).graph
    integer = any(node.op_type == "MatMulIntegerToFloat" for node in graph)
    made = {str(value.name) for node in graph.all_nodes() for value in node.outputs}
    found = {name.removesuffix(".low") for name in made if name.endswith(".low")}
    listed = {product_of(module) for module in kernels.wide}
    wrong = len(found ^ listed) + int(integer != kernels.integer)
    return Line("linears of 14-bit activations = those listed", "others", wrong, 0, wrong == 0)


def bfloat16_line(path: Path) -> Line:
    """A bfloat16 graph: weights, caches and what its products read are that; ids, logits and tables are not."""
    model = load_file(Path(path) / GRAPH)
    bfloat16, graph = ir.DataType.BFLOAT16, model.graph
    inferred = {value.name: value.dtype for value in graph.initializers.values()}
    inferred |= {value.name: value.dtype for value in (*graph.inputs, *graph.outputs)}
    for node in graph.all_nodes():
        if node.op_type == "Cast":
            kind: ir.DataType | None = ir.DataType(node.attributes["to"].as_int())
        elif node.op_type in ("Split", "GroupQueryAttention", *SAME_TYPE):
            kind = inferred.get(node.inputs[0].name) if node.inputs[0] is not None else None
        else:
            kind = None
        inferred |= {value.name: kind for value in node.outputs if value.name}
    wrong = [
        value.name
        for node in graph.all_nodes()
        if node.op_type in ("FusedMatMul", "GroupQueryAttention", "RMSNormalization")
        for value in node.inputs[:2]
        if value is not None and inferred.get(value.name) != bfloat16
    ]
    wrong += [name for name, kind in inferred.items() if str(name).startswith("present.") and kind != bfloat16]
    wrong += [] if inferred[LOGITS] == ir.DataType.FLOAT else [LOGITS]
    return Line("products, norms and caches in bfloat16, logits in float32", "others", len(wrong), 0, not wrong)
