"""What Gemma 3n computes beside attention and MLP: streams that are carried along, LAuReL, gates of which few are left.

Streams are one value [B,S,streams,H]: a choice of tokens takes all streams of each. The formulas are those of
`architectures.AltUp` and `architectures.Laurel`, which are transformers' (modeling_gemma3n.py).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import AltUp, Laurel, LayerSpec
from gemma_deploy.backends.onnxruntime.parts import DecoderParts
from gemma_deploy.backends.onnxruntime.weights import Weights
from gemma_deploy.names import MICROSOFT, STREAM_PROJECTION, STREAM_UNEMBED, STREAMS

SMALLEST = 1e-5  # mean square of a stream before it is brought to another's size, at least


class Streams:
    """Nodes of the streams of one graph.

    Args:
        parts: what adds linears and norms; altup: of every layer.
    """

    def __init__(self, parts: DecoderParts, altup: AltUp) -> None:
        self.parts, self.nodes, self.altup = parts, parts.nodes, altup
        self.hidden_size = parts.config.hidden_size
        self.laurels: dict[int, ir.Value] = {}  # [B,S,H] of layers whose attention is not yet added

    def entered(self, embeds: ir.Value) -> ir.Value:
        """[B,S,H] -> the first streams: the embeddings, and projections of them of their size."""
        size, made = self._size(embeds, "model.embeds"), [embeds]
        for i in range(self.altup.streams - 1):
            name = f"{STREAM_PROJECTION}.{i}"
            made.append(self._alike(self.parts._product(embeds, name), size, name))
        rows = [self._row(value, f"{STREAMS}.{i}") for i, value in enumerate(made)]
        return self.nodes.one("Concat", rows, STREAMS, axis=2)

    def left(self, streams: ir.Value) -> ir.Value:
        """The last streams -> [B,S,H]: the mean of the first, and of projections of the others of its size."""
        nodes, count = self.nodes, self.altup.streams
        names = [f"model.last_streams.{i}" for i in range(count)]
        rows = nodes.many("Split", [streams, nodes.numbers(*[1] * count)], [f"{name}.row" for name in names], axis=2)
        first, *others = (
            nodes.one("Squeeze", [row, nodes.numbers(2)], name) for row, name in zip(rows, names, strict=True)
        )
        size, total = self._size(first, names[0]), first
        for i, value in enumerate(others):
            name = f"{STREAM_UNEMBED}.{i}"
            brought = self._alike(self.parts._product(value, name), size, name)
            total = nodes.one("Add", [total, brought], f"{name}.total")
        return nodes.one("Mul", [total, self._number(1 / count)], f"{STREAMS}.mean")

    def predicted(self, layer: LayerSpec, streams: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Streams before a layer -> what it is expected to make of them, and the one that it computes [B,S,H]."""
        nodes, altup, path = self.nodes, self.altup, layer.prefix
        name = f"{path}{altup.prediction}"
        routed = self._routed(layer, self._active(streams, f"{path}altup.active"), "before")
        maps = nodes.one(
            "Reshape", [self._small(routed, name), nodes.numbers(0, 0, altup.streams, altup.streams)], f"{name}.maps"
        )
        change = nodes.one("MatMul", [maps, streams], f"{name}.change")
        predicted = nodes.one("Add", [streams, change], f"{path}altup.predicted")
        return predicted, self._active(predicted, f"{path}altup.predicted_active")

    def remember(self, layer: LayerSpec, laurel: Laurel, normed: ir.Value) -> None:
        """LAuReL of what attention reads [B,S,H], for the sum behind attention."""
        path, parts = layer.prefix, self.parts
        low = parts._product(normed, f"{path}{laurel.left}")
        made = parts._norm(parts._product(low, f"{path}{laurel.right}"), f"{path}{laurel.norm}")
        self.laurels[layer.index] = self.nodes.one("Add", [normed, made], f"{path}laurel.out")

    def joined(self, layer: LayerSpec, predicted: ir.Value, attended: ir.Value) -> ir.Value:
        """[B,S,H]: the computed stream, attention's result and LAuReL, over the root of two."""
        path, nodes = layer.prefix, self.nodes
        active = self._active(predicted, f"{path}altup.residual")
        both = nodes.one("Add", [active, attended], f"{path}attended")
        every = nodes.one("Add", [both, self.laurels.pop(layer.index)], f"{path}with_laurel")
        return nodes.one("Div", [every, self._number(math.sqrt(2))], f"{path}residual")

    def corrected(self, layer: LayerSpec, predicted: ir.Value, made: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What a layer made of its stream -> all streams, and that one [B,S,H] as the token's vector meets it."""
        path, nodes, altup = layer.prefix, self.nodes, self.altup
        name = f"{path}{altup.correction}"
        active = self._active(predicted, f"{path}altup.expected")
        news = self._row(nodes.one("Sub", [made, active], f"{path}altup.innovation"), f"{path}altup.innovation.row")
        weights = self._small(self._routed(layer, made, "behind"), name)
        factors = nodes.one("Add", [weights, self._number(1.0)], f"{name}.factors")
        column = nodes.one("Unsqueeze", [factors, nodes.numbers(3)], f"{name}.column")
        change = nodes.one("Mul", [news, column], f"{name}.change")
        streams = nodes.one("Add", [predicted, change], f"{path}altup.corrected")
        scale = f"{path}{altup.scale}"
        first = [self._active(streams, f"{path}altup.first"), self._weights.computed_view(scale)]
        return streams, nodes.one("Mul", first, f"{path}altup.first_scaled")

    def added(self, layer: LayerSpec, streams: ir.Value, own: ir.Value) -> ir.Value:
        """Streams, all but the first with what is added of the token's vector [B,S,H]."""
        nodes, path = self.nodes, layer.prefix
        others = np.ones((self.altup.streams, 1), np.float32)
        others[0] = 0
        name = f"others_of_{self.altup.streams}"
        which = self._weights.as_computed(nodes.constant(others, f"float32.{name}"), name)
        rows = nodes.one("Mul", [self._row(own, f"{path}per_layer.row"), which], f"{path}per_layer.rows")
        return nodes.one("Add", [streams, rows], f"{path}out")

    @property
    def _weights(self) -> Weights:
        return self.parts.weights

    def _number(self, value: float) -> ir.Value:
        return self._weights.scalar(value)

    def _active(self, streams: ir.Value, name: str) -> ir.Value:
        index = self.nodes.constant(np.int64(self.altup.active), f"int64.scalar.{self.altup.active}")
        return self.nodes.one("Gather", [streams, index], name, axis=2)

    def _row(self, value: ir.Value, name: str) -> ir.Value:
        """[B,S,H] -> [B,S,1,H]."""
        return self.nodes.one("Unsqueeze", [value, self.nodes.numbers(2)], name)

    def _routed(self, layer: LayerSpec, x: ir.Value, where: str) -> ir.Value:
        """[B,S,H] -> [B,S,streams]; a layer asks twice."""
        path, nodes, parts = layer.prefix, self.nodes, self.parts
        norm = f"{path}{self.altup.norm}"
        normed = nodes.one(
            "RMSNormalization", [x, self._weights.gain(norm)], f"{norm}.{where}",
            axis=-1, epsilon=parts.config.rms_norm_eps, stash_type=1,
        )  # fmt: skip
        small = nodes.one("Mul", [normed, self._number(1 / self.hidden_size)], f"{norm}.{where}.small")
        return nodes.one("Tanh", [self._small(small, f"{path}{self.altup.router}", where)], f"{path}altup.{where}")

    def _small(self, x: ir.Value, module: str, where: str = "out") -> ir.Value:
        """[..., in] -> [..., out] of a matrix that no artifact has as codes."""
        weight = self._weights.computed_view(f"{module}.weight")
        return self.nodes.one("FusedMatMul", [x, weight], f"{module}.{where}", domain=MICROSOFT, transB=1)

    def _size(self, x: ir.Value, name: str) -> ir.Value:
        """Root mean square of every token [B,S,1]."""
        return self.nodes.one("Sqrt", [self._mean_square(x, name)], f"{name}.size")

    def _mean_square(self, x: ir.Value, name: str) -> ir.Value:
        square = self.nodes.one("Mul", [x, x], f"{name}.square")
        return self.nodes.one("ReduceMean", [square, self.nodes.numbers(-1)], f"{name}.mean_square")

    def _alike(self, x: ir.Value, size: ir.Value, name: str) -> ir.Value:
        """[B,S,H] brought to a size [B,S,1]."""
        nodes = self.nodes
        mean = nodes.one("Max", [self._mean_square(x, name), self._number(SMALLEST)], f"{name}.at_least")
        own, wanted = nodes.one("Sqrt", [mean], f"{name}.size"), nodes.one("Mul", [x, size], f"{name}.wanted")
        return nodes.one("Div", [wanted, own], f"{name}.alike")


def sparse(parts: DecoderParts, gate: ir.Value, name: str, *, share: float) -> ir.Value:
    """Gates [B,S,inner] above a quantile of the normal distribution of their mean and deviation; the others are zero.

    Args:
        share: of a normal distribution below the quantile.
    """
    nodes, weights, axis = parts.nodes, parts.weights, parts.nodes.numbers(-1)
    centred = nodes.one("Sub", [gate, nodes.one("ReduceMean", [gate, axis], f"{name}.mean")], f"{name}.centred")
    square = nodes.one("Mul", [centred, centred], f"{name}.square")
    deviation = nodes.one("Sqrt", [nodes.one("ReduceMean", [square, axis], f"{name}.variance")], f"{name}.deviation")
    cutoff = nodes.one("Mul", [deviation, weights.scalar(NormalDist().inv_cdf(share))], f"{name}.cutoff")
    return nodes.one("Relu", [nodes.one("Sub", [centred, cutoff], f"{name}.above")], f"{name}.sparse")
