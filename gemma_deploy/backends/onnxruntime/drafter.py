"""A drafter as one graph: a token and a hidden state of the model it guesses for, to logits and the next state.

Its inputs and outputs are those of `graph.contract.DrafterContract`. Layers are the decoder's with queries alone; their
keys and values are another model's caches, which GroupQueryAttention takes as those before a step of no keys
(decoder.py). The one query then has the last of their positions, T - 1; the token stands at T, so that it is turned by
the row of the rotary tables behind that one. Layers with a window see as many keys as it is long and one more, as
transformers' class has it: the distance to the farthest is the window.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.architectures.drafting import CENTROIDS, POST_PROJECTION, PRE_PROJECTION, TOKEN_ORDERING
from gemma_deploy.backends.onnxruntime.decoder import LOGITS, Decoder, Shared
from gemma_deploy.backends.onnxruntime.head import whole_head
from gemma_deploy.backends.onnxruntime.options import Kernels
from gemma_deploy.backends.onnxruntime.padding import INT32, Tokens
from gemma_deploy.backends.onnxruntime.per_layer import rows_of
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.graph.contract import ENCODER, SHARED_KV, TOKEN_STATES, DrafterContract, Port
from gemma_deploy.graph.external import Row, onnx_type
from gemma_deploy.names import EMBEDDING, HEAD, MICROSOFT, NORM

INT64 = ir.DataType.INT64.value
WORST = 1.0  # how far below the smallest logit that was computed all others lie


def build_drafter(
    config: ModelConfig, kernels: Kernels, rows: Iterable[Row], *, location: str, contract: DrafterContract
) -> ir.Model:
    """The graph of an artifact; its weights are views of the parameter file. Arguments as of `build_decoder`.

    Raises:
        ExportError: graph and file disagree.
    """
    made = _Drafter(config, kernels, rows, location=location, embed_scale=1.0)
    return made.drafter(contract)


class _Drafter(Decoder):
    """Shares what a decoder makes of one layer."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._next: dict[str, ir.Value] = {}

    def drafter(self, contract: DrafterContract) -> ir.Model:
        """Joining projection, layers, last norm, logits, projection back."""
        nodes, config = self.nodes, self.config
        inputs = {port.name: _value(port) for port in contract.inputs(ENCODER)}
        states, mask = list(inputs.values())[:2]
        hidden = self._float_product(states, PRE_PROJECTION)
        columns = nodes.one("Shape", [mask], "total_length", start=1, end=2)
        total = nodes.one("Cast", [columns], "total_sequence_length", to=INT32)
        last = nodes.one("Sub", [total, nodes.constant(np.array([1], np.int32), "int32.1")], "last_seqlens_k")
        shared = Shared(Tokens(states, last, total, None, states, last), {})
        for layer in config.layers:
            source = [inputs[f"{SHARED_KV}.{layer.kind}.{part}"] for part in ("key", "value")]
            normed = self._norm(hidden, f"{layer.prefix}{layer.branches[0].norm}")
            attended = self._sharing_attention(layer, normed, shared, source)
            hidden = self._after_attention(layer, attended, hidden)
        normed = self._norm(hidden, NORM)
        logits = self._ordered_logits(normed) if config.drafting and config.drafting.centroids else self._all(normed)
        following = self._float_product(normed, POST_PROJECTION)
        logits.name, following.name = LOGITS, TOKEN_STATES
        for value, port in zip((logits, following), contract.outputs(ENCODER), strict=True):
            value.shape, value.type = ir.Shape(port.shape), ir.TensorType(ir.DataType.FLOAT)
        return self._finished(list(inputs.values()), [logits, following], "drafter")

    def _rotary(self, layer: LayerSpec) -> list[ir.Value]:
        """The tables from their second row on."""
        tables = []
        for table, value in zip(("cos", "sin"), super()._rotary(layer), strict=True):
            name = f"rotary.{layer.kind}.{table}.next"
            if name not in self._next:
                most = self.nodes.numbers(np.iinfo(np.int64).max)
                first, axis = self.nodes.numbers(1), self.nodes.numbers(0)
                self._next[name] = self.nodes.one("Slice", [value, first, most, axis], name)
            tables.append(self._next[name])
        return tables

    def _grouped(self, layer: LayerSpec) -> dict[str, Any]:
        """See `Decoder`: with a key more in the window."""
        grouped = super()._grouped(layer)
        return grouped if layer.window is None else grouped | {"local_window_size": layer.window + 1}

    def _all(self, normed: ir.Value) -> ir.Value:
        """[1,1,H] -> logits of all tokens [1,1,V]."""
        module = EMBEDDING if self.config.tie_word_embeddings else HEAD
        return whole_head(self.nodes, self.weights, module, block=self.kernels.block, normed=normed)

    def _ordered_logits(self, normed: ir.Value) -> ir.Value:
        """[1,1,H] -> logits [1,1,V]: those of the tokens in the likeliest groups, all others below the smallest."""
        nodes, drafting, words = self.nodes, self.config.drafting, self.config.vocab_size
        assert drafting is not None
        module = EMBEDDING if self.config.tie_word_embeddings else HEAD
        likely = self._float_product(normed, CENTROIDS)
        _, groups = nodes.many("TopK", [likely, nodes.numbers(drafting.chosen)], ["groups.top", "groups"], axis=-1)
        order = nodes.one("Cast", [self.weights.view([TOKEN_ORDERING], TOKEN_ORDERING)], "order", to=INT64)
        grouped = nodes.one("Reshape", [order, nodes.numbers(drafting.centroids, -1)], "order.grouped")
        chosen = nodes.one("Gather", [grouped, groups], "tokens.grouped")
        ids = nodes.one("Reshape", [chosen, nodes.numbers(1, -1)], "tokens")
        rows = rows_of(nodes, self._matrix(module), ids, table=module)
        column = nodes.one("Reshape", [normed, nodes.numbers(1, -1, 1)], "normed.column")
        products = nodes.one("MatMul", [rows, column], f"{HEAD}.products")
        made = nodes.one("Reshape", [products, nodes.numbers(-1)], f"{HEAD}.chosen_logits")
        least = nodes.one("ReduceMin", [made], f"{HEAD}.least", keepdims=0)
        below = nodes.one("Sub", [least, nodes.scalar(WORST)], f"{HEAD}.below")
        others = nodes.one("Expand", [below, nodes.numbers(words)], f"{HEAD}.others")
        places = nodes.one("Reshape", [ids, nodes.numbers(-1, 1)], "tokens.places")
        whole = nodes.one("ScatterND", [others, places, made], f"{HEAD}.flat")
        return nodes.one("Reshape", [whole, nodes.numbers(1, 1, words)], f"{HEAD}.out")

    def _float_product(self, x: ir.Value, name: str) -> ir.Value:
        """The product with a matrix [out, in] that is no codes, in float32."""
        matrix = self.weights.view([name], name)
        if matrix.dtype != ir.DataType.FLOAT:
            matrix = self.nodes.one("Cast", [matrix], f"{name}.wide", to=ir.DataType.FLOAT.value)
        module = name.removesuffix(".weight")
        return self.nodes.one("FusedMatMul", [x, matrix], f"{module}.out", domain=MICROSOFT, transB=1)


def _value(port: Port) -> ir.Value:
    return ir.Value(name=port.name, shape=ir.Shape(port.shape), type=ir.TensorType(onnx_type(port.dtype)))
