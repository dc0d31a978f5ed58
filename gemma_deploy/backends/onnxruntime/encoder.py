"""An encoder as one dynamic graph: token ids and their mask to hidden states, and to a vector for each text.

input_ids, attention_mask [B,S] int64 -> last_hidden_state [B,S,H], sentence_embedding [B,dimensions], both float32: the
names that exports of sentence-transformers have. Embedding, linears and norms are the decoder's (decoder.py); attention
is ONNX's own operator with a mask of what each position sees, because GroupQueryAttention takes no window without
causality. Padding may stand on either side: nobody attends to it, and the mean leaves it out.

Everything behind the last norm is float32, whatever the rest is.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.backends.onnxruntime.decoder import Decoder
from gemma_deploy.backends.onnxruntime.options import Kernels
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.checkpoint.sentence import LEAST_LENGTH, LEAST_TOKENS
from gemma_deploy.graph.contract import BATCH, ENCODER, SEQUENCE, TEXT_VECTORS, TOKEN_STATES
from gemma_deploy.graph.external import Row
from gemma_deploy.names import MICROSOFT, NORM, TOKEN_PROJECTION


def build_encoder(
    config: ModelConfig, kernels: Kernels, rows: Iterable[Row], *, location: str, embed_scale: float
) -> ir.Model:
    """The graph of an artifact; its weights are views of the parameter file. Arguments as of `build_decoder`.

    Raises:
        ExportError: graph and file disagree.
    """
    return _Encoder(config, kernels, rows, location=location, embed_scale=embed_scale).model()


class _Encoder(Decoder):
    """Shares what a decoder makes of one layer, attention aside."""

    def model(self) -> ir.Model:
        """Embedding, layers, last norm, mean, dense layers, length 1."""
        nodes, config = self.nodes, self.config
        ids, mask = (
            ir.Value(name=name, shape=ir.Shape((BATCH, SEQUENCE)), type=ir.TensorType(ir.DataType.INT64))
            for name in ("input_ids", "attention_mask")
        )
        hidden = self._embed(ids)
        if (vectors := self._vectors_of_layers(ids, hidden)) is not None:
            self._share_out(vectors, range(config.num_hidden_layers))
        places = self._places(ids)
        seen = self._seen(places, mask)
        positions = nodes.one("Expand", [places, nodes.one("Shape", [ids], "ids.shape")], "positions")
        for layer in config.layers:
            attended = self._attended(layer, hidden, positions=positions, mask=seen[layer.kind])
            hidden = self._after_attention(layer, attended, hidden, self.vectors.get(layer.index))
        states = self._wide(self._norm(hidden, NORM), f"{NORM}.wide")
        if config.projects_tokens:
            states = self._dense(states, TOKEN_PROJECTION)
        vectors = self._vectors(states, mask)
        assert config.sentence is not None
        outputs = [
            self._output(states, TOKEN_STATES, (BATCH, SEQUENCE, config.token_size)),
            self._output(vectors, TEXT_VECTORS, (BATCH, config.sentence.dimensions)),
        ]
        return self._finished([ids, mask], outputs, ENCODER)

    def _output(self, value: ir.Value, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        """A value under an output's name; its own stays, because comparisons look for it."""
        made = self.nodes.one("Identity", [value], name)
        made.shape, made.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        return made

    def _places(self, ids: ir.Value) -> ir.Value:
        """[S] int64: 0, 1, 2, ...; padding has places too, as in transformers."""
        nodes = self.nodes
        count = nodes.one("Squeeze", [nodes.one("Shape", [ids], "length", start=1, end=2)], "count")
        first, step = (nodes.constant(np.int64(number), f"int64.scalar.{number}") for number in (0, 1))
        return nodes.one("Range", [first, count, step], "places")

    def _seen(self, places: ir.Value, mask: ir.Value) -> dict[str, ir.Value]:
        """For each kind of layer, bool [B,1,S,S]: real tokens within reach on either side, and every place itself.

        A place of padding sees itself, so that no row of the softmax is empty.
        """
        nodes = self.nodes
        column, row = (nodes.one("Unsqueeze", [places, nodes.numbers(axis)], f"places.{axis}") for axis in (1, 0))
        distance = nodes.one("Abs", [nodes.one("Sub", [column, row], "difference")], "distance")
        itself = nodes.one("Equal", [distance, nodes.constant(np.int64(0), "int64.scalar.0")], "itself")
        true = nodes.one("Cast", [mask], "real", to=ir.DataType.BOOL.value)
        real = nodes.one("Unsqueeze", [true, nodes.numbers(1, 2)], "real.keys")
        found: dict[str, ir.Value] = {}
        for layer in self.config.templates:
            kind, near = layer.kind, real
            if layer.window is not None:
                reach = np.int64(layer.window // 2)
                within = nodes.one(
                    "LessOrEqual", [distance, nodes.constant(reach, f"int64.scalar.{reach}")], f"near.{kind}"
                )
                near = nodes.one("And", [real, within], f"near.{kind}.real")
            found[kind] = nodes.one("Or", [near, itself], f"mask.{kind}")
        return found

    def _attended(self, layer: LayerSpec, hidden: ir.Value, *, positions: ir.Value, mask: ir.Value) -> ir.Value:
        """Attention's output [B,S,heads*D] before o_proj."""
        path, nodes, norms = layer.prefix, self.nodes, dict(layer.head_norms)
        attention, _ = layer.branches
        readers = attention.entry.readers
        made = self._products(self._norm(hidden, f"{path}{attention.norm}"), [f"{path}{name}" for name in readers])
        turned: list[ir.Value] = []
        for name, value in zip(readers, made, strict=True):
            if name not in norms:
                if layer.value_norm:
                    value = self._head_norm(value, f"{path}{layer.value_norm}", layer.kv_heads, layer.head_dim)
                turned.append(value)
                continue
            heads = layer.heads if name == attention.entry.observed else layer.kv_heads
            normed = self._head_norm(value, f"{path}{norms[name]}", heads, layer.head_dim)
            tables = [self.weights.rotary(layer.kind, table) for table in ("cos", "sin")]
            turned.append(
                nodes.one("RotaryEmbedding", [normed, *tables, positions], f"{path}{name}.turned", num_heads=heads)
            )
        return nodes.one(
            "Attention",
            [*turned, mask],
            f"{path}{attention.module}.out",
            q_num_heads=layer.heads,
            kv_num_heads=layer.kv_heads,
            scale=float(layer.attention_scale),
        )

    def _vectors(self, states: ir.Value, mask: ir.Value) -> ir.Value:
        """[B,S,H], [B,S] -> [B,dimensions]: mean over real tokens, dense layers, length 1."""
        nodes, sentence = self.nodes, self.config.sentence
        assert sentence is not None
        real = nodes.one("Cast", [mask], "pooling.real", to=ir.DataType.FLOAT.value)
        column = nodes.one("Unsqueeze", [real, nodes.numbers(2)], "pooling.column")
        kept = nodes.one("Mul", [states, column], "pooling.kept")
        total = nodes.one("ReduceSum", [kept, nodes.numbers(1)], "pooling.sum", keepdims=0)
        count = nodes.one("ReduceSum", [real, nodes.numbers(1)], "pooling.count", keepdims=1)
        vector = nodes.one("Div", [total, nodes.one("Max", [count, nodes.scalar(LEAST_TOKENS)], "pooling.tokens")],
                           "pooling.out")  # fmt: skip
        for layer in sentence.dense:
            vector = self._dense(vector, layer.name)
        length = nodes.one("ReduceL2", [vector, nodes.numbers(-1)], "normalize.length", keepdims=1)
        least = nodes.one("Max", [length, nodes.scalar(LEAST_LENGTH)], "normalize.least")
        return nodes.one("Div", [vector, least], "normalize.out")

    def _dense(self, value: ir.Value, module: str) -> ir.Value:
        """[..., in] -> [..., out] in float32, without codes."""
        name = f"{module}.weight"
        matrix = self._wide(self.weights.view([name], name), f"{name}.wide")
        return self.nodes.one("FusedMatMul", [value, matrix], f"{module}.out", domain=MICROSOFT, transB=1)

    def _wide(self, value: ir.Value, name: str) -> ir.Value:
        """In float32."""
        dtype = value.dtype or self.dtype  # of what a node of this graph makes
        if dtype == ir.DataType.FLOAT:
            return value
        return self.nodes.one("Cast", [value], name, to=ir.DataType.FLOAT.value)
