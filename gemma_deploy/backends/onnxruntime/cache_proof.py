"""`cache_lines` proves caches of codes, in the artifact's own graph and on this machine, against NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.backends.onnxruntime.cache_codes import ATTENTION, PARTS, PAST, PRESENT, SCALES, is_cache
from gemma_deploy.backends.onnxruntime.options import GRAPH
from gemma_deploy.backends.onnxruntime.window import windows_of
from gemma_deploy.calibration.points import cache_scale_names
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.parity.gates import Line
from gemma_deploy.runtime.session import load_file, open_graph

LAST = ".last"
QUERIES = 16  # of a step, whose attention is computed in float64
BEHIND = 40  # tokens of a prompt behind the first window
STEPS = 2
FETCHED = 256 << 20  # bytes of values that are looked at together
# Codes are chosen in float32, NumPy's in float64: a value this near to the middle of two may have either.
MIDDLE = 1e-3
# Attention in float32, relative to its largest; the operator alone up to 4e-6, exact keys in their place 1e-2 and more.
LIMIT = 2e-5


def cache_lines(artifact: Path, config: ModelConfig, tokens: Sequence[int]) -> list[Line]:
    """Three gates: every cache has its own steps, is written the nearest code, and is what attention reads.

    The graph is run as it is, on a prompt and a few single tokens behind it. Buffers of windows have room for all.

    Args:
        config: of the model; tokens: of a text; as many are read as go beyond the longest window.

    Raises:
        ArtifactError: the graph is missing or damaged.
    """
    artifact = Path(artifact).resolve()
    model = load_file(artifact / GRAPH)
    layers = [Attention.of(node) for node in model.graph if node.op_type == ATTENTION]
    caches = [value for value in model.graph.inputs if is_cache(value)]
    uncoded = sum(value.dtype != ir.DataType.INT8 for value in caches)
    uncoded += sum(layer.steps != steps_of(config, spec) for layer, spec in zip(layers, config.layers, strict=True))
    longest = max((layer.window for layer in layers), default=0)
    tokens = list(tokens)[: longest + BEHIND + STEPS]
    wrong, error = len(caches), math.inf
    if not uncoded:
        watched, wrong, error = _Watched(artifact, layers, tokens), 0, 0.0
        for group in _together(layers, len(tokens)):
            codes, off = watched.compared(group)
            wrong, error = wrong + codes, float(np.maximum(error, off))
    return [
        Line("caches = codes with the steps of their channels", "others", uncoded, 0, uncoded == 0),
        Line("codes of the cache = NumPy", "values that are not the nearest code", wrong, 0, wrong == 0),
        Line("attention = NumPy on the codes of the cache", "relative error", error, LIMIT, error <= LIMIT),
    ]


@dataclass(frozen=True)
class Attention:
    """A node that attends.

    Args:
        name: of its output; made: of queries, keys and values, or of all three in one.
        source: begins the names of the caches that it reads; shares: whether another node writes them.
        cos, sin: [positions, D / 2] float32.
        steps, scales: of keys and values, names and numbers [1, Hk, 1, D] float32; none where they are no codes.
    """

    name: str
    made: tuple[str, ...]
    source: str
    shares: bool
    heads: int
    kv_heads: int
    scale: float
    softcap: float
    window: int
    cos: np.ndarray
    sin: np.ndarray
    steps: tuple[str, ...]
    scales: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, node: ir.Node) -> Attention:
        """What a node says."""
        inputs, numbers = [*node.inputs, *[None] * 20], node.attributes
        name, past = str(node.outputs[0].name), node.inputs[3]
        assert past is not None, name
        shares = past.producer() is not None
        cos, sin = (_stored(inputs[index]) for index in (7, 8))
        steps = [value for value in (inputs[index] for index in SCALES) if value is not None]
        return cls(
            name=name,
            made=tuple(str(value.name) for value in inputs[: 1 if shares else 3] if value is not None),
            source=str(past.name).rpartition(".")[0].replace(PRESENT, PAST),
            shares=shares,
            heads=numbers["num_heads"].as_int(),
            kv_heads=numbers["kv_num_heads"].as_int(),
            scale=numbers["scale"].as_float(),
            softcap=numbers["softcap"].as_float() if "softcap" in numbers else 0.0,
            window=numbers["local_window_size"].as_int() if "local_window_size" in numbers else 0,
            cos=cos,
            sin=sin,
            steps=tuple(str(value.name) for value in steps),
            scales=tuple(map(_stored, steps)),
        )

    @property
    def watched(self) -> tuple[str, ...]:
        """What is looked at: queries, keys and values, then the output; `LAST` says of the last tokens alone."""
        if len(self.made) == 1 and not self.shares:
            return (*self.made, f"{self.name}{LAST}")
        return (f"{self.made[0]}{LAST}", *self.made[1:], f"{self.name}{LAST}")

    def apart(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Queries, keys and values [S, heads, D] float64, not turned; of shared ones queries alone."""
        size = 2 * self.cos.shape[1]
        rows = [value[0].astype(np.float64) for value in values]
        if len(rows) == 1 and not self.shares:
            ends = [self.heads * size, (self.heads + self.kv_heads) * size]
            rows = np.split(rows[0], ends, axis=1)
        return [row.reshape(len(row), -1, size) for row in rows]

    def turned(self, x: np.ndarray, first: int) -> np.ndarray:
        """[S, heads, D] at positions from `first` on."""
        cos, sin = (table[first : first + len(x), None].astype(np.float64) for table in (self.cos, self.sin))
        left, right = np.split(x, 2, axis=2)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=2)

    def attended(self, queries: np.ndarray, caches: Sequence[np.ndarray], first: int) -> np.ndarray:
        """[S, heads * D] of turned queries from position `first` on, to codes [Hk, T, D]."""
        read = [_read(codes, scale) for codes, scale in zip(caches, self.scales, strict=True)]
        places, made = np.arange(read[0].shape[1]), np.zeros_like(queries)
        own = first + np.arange(len(queries))[:, None]
        seen = places <= own
        if self.window:
            seen &= places > own - self.window
        for head in range(self.heads):
            keys, values = (one[head * self.kv_heads // self.heads] for one in read)
            scores = queries[:, head] @ keys.T * self.scale
            if self.softcap:
                scores = self.softcap * np.tanh(scores / self.softcap)
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            made[:, head] = weights / weights.sum(1, keepdims=True) @ values
        return made.reshape(len(queries), -1)


def steps_of(config: ModelConfig, layer: LayerSpec) -> tuple[str, ...]:
    """Names of the parameters with the steps of what a layer reads."""
    names = cache_scale_names(layer if layer.cache_from is None else config.layers[layer.cache_from])
    return tuple(names[part] for part in PARTS)


def wrong_codes(codes: np.ndarray, exact: np.ndarray, scale: np.ndarray) -> int:
    """Codes that are not the nearest to a value, or not the last one where it is beyond that.

    Args:
        codes: [1, Hk, S, D]; exact: [S, Hk, D]; scale: [1, Hk, 1, D].
    """
    wanted = np.clip(exact.transpose(1, 0, 2) / scale[0].astype(np.float64), -128, 127)
    return int((np.abs(codes[0] - wanted) > 0.5 + MIDDLE).sum())


def _read(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[Hk, T, D] float64 that codes [1, Hk, T, D] stand for."""
    found: np.ndarray = codes[0] * scale[0].astype(np.float64)
    return found


class _Watched:
    """A session on the graph as it is, which gives what attention reads and makes as well."""

    def __init__(self, artifact: Path, layers: Sequence[Attention], tokens: Sequence[int]) -> None:
        model = load_file(artifact / GRAPH)
        graph, self.tokens = model.graph, tokens
        made = {str(value.name): value for node in graph for value in node.outputs}
        places = [np.array([number], np.int64) for number in (-QUERIES, np.iinfo(np.int64).max, 1)]
        ends = [_constant(graph, place, f"watched.{at}") for at, place in enumerate(places)]
        for name in dict.fromkeys(name for layer in layers for name in layer.watched):
            value = made[name.removesuffix(LAST)]
            if name.endswith(LAST):
                node = ir.node("Slice", [value, *ends])
                value.producer().append(node)  # type: ignore[union-attr]
                value = node.outputs[0]
                value.name = name
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(value)
        windows = windows_of(graph)
        self.session = open_graph(model, artifact)
        room = {name: max(len(tokens), window) for name, window in windows.items()}
        self.empty = {
            value.name: np.zeros((1, value.shape[1], room.get(value.name, 0), value.shape[3]), np.int8)
            for value in self.session.get_inputs()
            if value.name.startswith(PAST)
        }

    def compared(self, layers: Sequence[Attention]) -> tuple[int, float]:
        """Of some layers: codes that are not the nearest, and the largest error of what attention gives."""
        wrong, error, caches, at = 0, 0.0, self.empty, 0
        names = list(dict.fromkeys(name for layer in layers for name in layer.watched))
        names += [name.replace(PAST, PRESENT) for name in caches]
        last = min(STEPS, len(self.tokens) - 1)
        for end in range(len(self.tokens) - last, len(self.tokens) + 1):
            ids, mask = np.array([self.tokens[at:end]], np.int64), np.ones((1, end), np.int64)
            given = {"input_ids": ids, "attention_mask": mask} | caches
            found = dict(zip(names, self.session.run(names, given), strict=True))
            caches = {name: found[name.replace(PAST, PRESENT)] for name in caches}
            for layer in layers:
                codes, off = _compared_step(layer, found, caches, at=at, end=end)
                wrong, error = wrong + codes, float(np.maximum(error, off))  # NaN stays
            at = end
        return wrong, error


def _compared_step(
    layer: Attention, found: dict[str, np.ndarray], caches: dict[str, np.ndarray], *, at: int, end: int
) -> tuple[int, float]:
    """Of one layer and tokens [at, end)."""
    values = layer.apart([found[name] for name in layer.watched[:-1]])
    held = [caches[f"{layer.source}.{part}"][:, :, :end] for part in PARTS]
    wrong = 0
    if not layer.shares:
        exact = (layer.turned(values[1], at), values[2])
        wrong = sum(
            wrong_codes(codes[:, :, at:end], one, scale)
            for codes, one, scale in zip(held, exact, layer.scales, strict=True)
        )
    last = values[0][-QUERIES:]
    expected = layer.attended(layer.turned(last, end - len(last)), held, end - len(last))
    got = found[layer.watched[-1]][0]
    return wrong, float(np.abs(got - expected).max() / np.abs(expected).max())


def _together(layers: Sequence[Attention], tokens: int) -> Iterator[list[Attention]]:
    """Layers in groups whose keys and values are few enough to look at together."""
    group: list[Attention] = []
    for layer in layers:
        each = 4 * tokens * 2 * layer.cos.shape[1] * 2 * layer.kv_heads
        if group and (len(group) + 1) * each > FETCHED:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def _constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """A new initializer."""
    value = ir.Value(
        name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
    )  # fmt: skip
    graph.register_initializer(value)
    return value


def _stored(value: ir.Value | None) -> np.ndarray:
    """The numbers of an initializer."""
    assert value is not None
    assert value.const_value is not None, value.name
    stored: np.ndarray = value.const_value.numpy()
    return stored
