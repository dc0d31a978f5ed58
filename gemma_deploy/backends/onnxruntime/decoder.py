"""The whole decoder as one dynamic graph, top to bottom.

input_ids [B,S] int64, attention_mask [B,T] int64, past_key_values.{i}.key/value [B,Hk,*,D] -> logits [B,1,V] float32,
present.{i}.key/value: the names and meanings that onnxruntime-genai expects. GroupQueryAttention rotates, masks, and
writes into the cache where past and present are one buffer. Rows may be padded on either side (padding.py); logits are
those of each row's last token, which is chosen as soon as the last layer has attended, or of every token [B,S,V].

A bfloat16 graph is for GPU providers: ONNX Runtime has no such kernels for a CPU. Embedding and soft cap are float32 in
it, logits leave in float32, norms are computed in float32 (stash_type).

Where the file has signed codes [in, out], linears are integer products of whole rows, for prompts and single tokens
alike: what a token gives does not depend on its company. The head and all other codes have the block kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from gemma_deploy.architectures import LayerSpec, PerLayer
from gemma_deploy.backends.onnxruntime.cache_codes import PARTS
from gemma_deploy.backends.onnxruntime.experts import ExpertParts
from gemma_deploy.backends.onnxruntime.head import screened_head, whole_head
from gemma_deploy.backends.onnxruntime.lora import Updates
from gemma_deploy.backends.onnxruntime.options import ALL, Kernels
from gemma_deploy.backends.onnxruntime.padding import Tokens, real_tokens_first
from gemma_deploy.backends.onnxruntime.per_layer import (
    by_layer,
    context_of,
    halved,
    joined,
    known_ids,
    rows_of,
    table_part,
)
from gemma_deploy.backends.onnxruntime.shared_window import Held, held_positions, query_positions
from gemma_deploy.backends.onnxruntime.streams import Streams, sparse
from gemma_deploy.backends.onnxruntime.window import WINDOW_CACHE
from gemma_deploy.backends.spec import embedding_scale
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.graph.contract import AdapterSlots
from gemma_deploy.graph.external import Row
from gemma_deploy.names import (
    COLUMN_FACTOR,
    EMBEDDING,
    HEAD,
    MICROSOFT,
    NORM,
    PER_LAYER_TABLE,
)

EMBEDDED, NORMED, LOGITS = "model.embed_tokens.out", "model.norm.out", "logits"


def build_decoder(
    config: ModelConfig,
    kernels: Kernels,
    rows: Iterable[Row],
    *,
    location: str,
    embed_scale: float,
    adapters: AdapterSlots | None = None,
    rounding: str = "exact",
) -> ir.Model:
    """The graph of an artifact; its weights are views of the parameter file.

    Args:
        rows: of the parameter file, which is `location` beside the graph.
        embed_scale: by which rows of the table are multiplied, where the file has no factor for each column; rounding:
            of such numbers, as in a recipe.
        adapters: what it takes of an adapter, as inputs that are nothing by default (lora.py); None: nothing.

    Raises:
        ExportError: graph and file disagree.
    """
    made = Decoder(config, kernels, rows, location=location, embed_scale=embed_scale, rounding=rounding)
    if adapters is not None:
        made.updates = Updates(made.nodes, adapters)
        made.weights.used.update(name for name in made.weights.rows if name.endswith(f".{COLUMN_FACTOR}"))
    return made.model()


def linears_of(config: ModelConfig) -> frozenset[str]:
    """Module paths of the linears of every layer."""
    return frozenset(f"{layer.prefix}{linear.name}" for layer in config.layers for linear in layer.linears)


@dataclass(frozen=True)
class Shared:
    """Values that every layer reads, computed once."""

    tokens: Tokens
    caches: dict[str, ir.Value]  # past_key_values.{i}.{key|value}
    vectors: ir.Value | None = None  # [B,S,layers * size], where layers add some


class Decoder(ExpertParts):
    """The graph of a decoder in the making; an encoder's shares its layers. Arguments as of `build_decoder`."""

    @cached_property
    def streams(self) -> Streams | None:
        """Where layers carry several of them along."""
        return None if self.config.altup is None else Streams(self, self.config.altup)

    def model(self) -> ir.Model:
        """Embedding, layers, the last layer's second half on one position, head."""
        config, nodes = self.config, self.nodes
        ids = _input("input_ids", ir.DataType.INT64, ("batch", "sequence"))
        mask = _input("attention_mask", ir.DataType.INT64, ("batch", "total_sequence"))
        caches = self._caches("past_key_values", "past_sequence").items()
        kind = ir.TensorType(self.cache_dtype)
        past = {name: ir.Value(name=name, shape=shape, type=kind) for name, shape in caches}
        every = self.kernels.logits == ALL
        sharing = config.first_sharing is not None
        tokens = real_tokens_first(nodes, ids, mask, windowed=bool(self.windowed), every=every, sharing=sharing)
        hidden = self._embed(tokens.ids)
        shared = Shared(tokens, past, self._vectors_of_layers(tokens.ids, hidden))
        if self.streams is not None:
            hidden = self.streams.entered(hidden)
        attended, residual, *present = self._layers(hidden, shared)
        if not every and not sharing:
            attended, residual = self._chosen_in_last(tokens, attended, residual)
        last = config.layers[-1]
        hidden = self._after_attention(last, attended, residual, self.vectors.get(last.index))
        normed = self._norm(hidden if self.streams is None else self.streams.left(hidden), NORM)
        if every:
            (normed,) = self._chosen(tokens, normed=normed)
        logits = self._head(normed)
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(("batch", "sequence" if every else 1, config.vocab_size))
        caches = self._caches("present", "total_sequence").items()
        for value, (name, shape) in zip(present, caches, strict=True):
            value.name, value.shape, value.type = name, shape, kind
        inputs = [ids, mask, *past.values(), *(self.updates.inputs if self.updates else ())]
        return self._finished(inputs, [logits, *present], "decoder")

    def _chosen_in_last(self, tokens: Tokens, attended: ir.Value, residual: ir.Value) -> list[ir.Value]:
        """Of the tokens whose logits are wanted: what the second half of the last layer reads."""
        last = self.config.layers[-1].index
        if last in self.vectors:
            (self.vectors[last],) = self._chosen(tokens, vectors=self.vectors[last])
        if self.streams is not None:
            (self.streams.laurels[last],) = self._chosen(tokens, laurel=self.streams.laurels[last])
        return self._chosen(tokens, attention=attended, residual=residual)

    def _layers(self, hidden: ir.Value, shared: Shared) -> list[ir.Value]:
        """[B,S,H] -> what the last layer's attention gives and the residual beside it, then all caches.

        Layers at the end that share keys and values write none: they compute the tokens whose logits are wanted alone.
        """
        config, caches = self.config, dict[int, list[ir.Value]]()
        first, attended, residual = config.first_sharing, hidden, hidden
        whole = range(config.num_hidden_layers if first is None else first)
        vectors = shared.vectors
        if vectors is not None:
            self._share_out(vectors, whole)
        for layer in config.layers:
            if layer.index == first:
                if self.kernels.logits != ALL:
                    (hidden,) = self._chosen(shared.tokens, sharing=hidden)
                if vectors is not None:
                    self._share_out(vectors, range(first, config.num_hidden_layers), tokens=shared.tokens)
            normed, residual = self._before_attention(layer, hidden)
            if layer.cache_from is None:
                attended, *caches[layer.index] = self._attention(layer, normed, shared)
            else:
                attended = self._sharing_attention(layer, normed, shared, caches[layer.cache_from])
            if layer is not config.layers[-1]:
                hidden = self._after_attention(layer, attended, residual, self.vectors.get(layer.index))
        return [attended, residual, *(cache for pair in caches.values() for cache in pair)]

    def _before_attention(self, layer: LayerSpec, hidden: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What attention reads [B,S,H], and what its result is added to; of streams, what is expected of them."""
        norm = f"{layer.prefix}{layer.branches[0].norm}"
        if self.streams is None:
            return self._norm(hidden, norm), hidden
        residual, active = self.streams.predicted(layer, hidden)
        normed = self._norm(active, norm)
        if layer.laurel is not None:
            self.streams.remember(layer, layer.laurel, normed)
        return normed, residual

    def _vectors_of_layers(self, ids: ir.Value, hidden: ir.Value) -> ir.Value | None:
        """What layers add of each token, [B,S,layers * size]; None where they add nothing."""
        config, table = self.config, self.config.per_layer
        if table is None:
            return None
        rows = None
        if table.rows:
            ids = known_ids(self.nodes, ids, table.rows) if table.rows < config.vocab_size else ids
            scale = embedding_scale(table.size, self.rounding)
            rows = table_part(self.nodes, self._matrix(PER_LAYER_TABLE), ids, table=table, scale=scale)
            if self.dtype != ir.DataType.FLOAT:
                rows = self.nodes.one("Cast", [rows], f"{PER_LAYER_TABLE}.half", to=self.dtype.value)
        projected = self._product(hidden, table.projection)
        context = context_of(self.weights, projected, table, hidden_size=config.hidden_size, eps=config.rms_norm_eps)
        return joined(self.nodes, context if rows is None else halved(self.weights, rows, context), table)

    def _share_out(self, vectors: ir.Value, layers: range, tokens: Tokens | None = None) -> None:
        """Give each of some layers its vectors; of the tokens whose logits are wanted, where `tokens` says which."""
        table = self.config.per_layer
        assert table is not None
        first, last = layers.start * table.size, layers.stop * table.size
        name = f"model.per_layer_inputs.{layers.start}"
        part = self.nodes.one("Slice", [vectors, *(self.nodes.numbers(one) for one in (first, last, 2))], name)
        if tokens is not None and self.kernels.logits != ALL:
            (part,) = self._chosen(tokens, **{name: part})
        self.vectors |= by_layer(self.nodes, part, list(layers), size=table.size)

    def _sharing_attention(
        self, layer: LayerSpec, normed: ir.Value, shared: Shared, source: Sequence[ir.Value]
    ) -> ir.Value:
        """Attention's output [B,N,heads*D] of queries alone, to the keys and values of an earlier layer.

        Keys and values of length 0, and that layer's caches after the step as those before it: GroupQueryAttention then
        adds nothing to them, and the queries are those of the last positions.
        """
        path, nodes, norms = layer.prefix, self.nodes, dict(layer.head_norms)
        attention, tokens = layer.branches[0], shared.tokens
        (query,) = attention.entry.readers
        made = self._product(normed, f"{path}{query}")
        made = self._head_norm(made, f"{path}{norms[query]}", layer.heads, layer.head_dim)
        width = layer.kv_heads * layer.head_dim
        nothing = nodes.one("Slice", [made, nodes.numbers(0), nodes.numbers(0), nodes.numbers(1)], f"{path}no_tokens")
        nothing = nodes.one(
            "Slice", [nothing, nodes.numbers(0), nodes.numbers(width), nodes.numbers(2)], f"{path}no_keys"
        )
        counts, positions = Held(tokens.last, tokens.total), None
        if layer.cache_from in self.windowed:
            if layer.cache_from not in self.held:
                name, window = f"model.layers.{layer.cache_from}.shared.", layer.window or 0
                self.held[layer.cache_from] = held_positions(nodes, tokens.last, source[0], window=window, name=name)
            counts, positions = self.held[layer.cache_from], query_positions(nodes, tokens.last, made, path=path)
        inputs = [made, nothing, nothing, *source, counts.seqlens, counts.total, *self._rotary(layer)]
        names = [f"{path}{attention.module}.out"]
        if self.cache_dtype == ir.DataType.INT8:  # of codes it is refused without them: copies that nobody reads
            names += [f"{path}unchanged.{part}" for part in PARTS]
        return nodes.many(
            "GroupQueryAttention",
            [*inputs, *self._behind_tables(layer, positions=positions)],
            names,
            **self._grouped(layer),
        )[0]

    def _embed(self, ids: ir.Value) -> ir.Value:
        table, nodes = EMBEDDING, self.nodes
        rows = rows_of(nodes, self._matrix(table), ids, table=table)
        columns = f"{table}.column_scale"
        factor = self.weights.view([columns], columns) if self.weights.has(columns) else nodes.scalar(self.embed_scale)
        if self.dtype == ir.DataType.FLOAT:
            return nodes.one("Mul", [rows, factor], EMBEDDED)
        return nodes.one("Cast", [nodes.one("Mul", [rows, factor], f"{table}.scaled")], EMBEDDED, to=self.dtype.value)

    def _attention(self, layer: LayerSpec, normed: ir.Value, shared: Shared) -> list[ir.Value]:
        """Attention's output [B,S,heads*D] before o_proj, and the layer's two caches."""
        path, nodes, norms = layer.prefix, self.nodes, dict(layer.head_norms)
        attention = layer.branches[0]
        readers, makers = attention.entry.readers, dict(layer.caches)
        # Attention reads all three from one value as well, unless something stands between.
        made = self._products(normed, [f"{path}{name}" for name in readers], apart=bool(norms))
        if norms:
            by_name, size = dict(zip(readers, made, strict=True)), layer.head_dim
            query, key = attention.entry.observed, makers["key"]
            value = by_name[makers["value"]]
            if layer.value_norm:
                value = self._head_norm(value, f"{path}{layer.value_norm}", layer.kv_heads, size)
            made = [
                self._head_norm(by_name[query], f"{path}{norms[query]}", layer.heads, size),
                self._head_norm(by_name[key], f"{path}{norms[key]}", layer.kv_heads, size),
                value,
            ]
        past = [shared.caches[f"past_key_values.{layer.index}.{part}"] for part in PARTS]
        tokens = shared.tokens
        inputs = [*made, *[None] * (3 - len(made)), *past, tokens.seqlens, tokens.total, *self._rotary(layer)]
        return nodes.many(
            "GroupQueryAttention",
            [*inputs, *self._behind_tables(layer, read=tokens.read)],
            [f"{path}{attention.module}.out", f"{path}present.key", f"{path}present.value"],
            **self._grouped(layer),
        )

    def _after_attention(
        self, layer: LayerSpec, attended: ir.Value, residual: ir.Value, vectors: ir.Value | None = None
    ) -> ir.Value:
        """o_proj, MLP, and the norms and sums around them: [B,S,heads*D], [B,S,H] -> [B,S,H].

        Args:
            vectors: [B,S,size] that the layer adds; None: it adds none.
        """
        path, nodes = layer.prefix, self.nodes
        attention, mlp = layer.branches
        made = self._product(attended, f"{path}{attention.output}")
        if attention.post_norm:
            made = self._norm(made, f"{path}{attention.post_norm}")
        if self.streams is not None:
            return self._after_sum(layer, self.streams, residual, self.streams.joined(layer, residual, made))
        normed, _, _, hidden = nodes.many(
            "SkipSimplifiedLayerNormalization",
            [made, residual, self.weights.gain(f"{path}{mlp.norm}")],
            [f"{path}{mlp.norm}.out", "", "", f"{path}residual"],
            domain=MICROSOFT,
            epsilon=self.config.rms_norm_eps,
        )
        made = self._mlp(layer, normed)
        if layer.experts is not None:
            made = self._beside_experts(layer, dense=made, residual=hidden)
        if mlp.post_norm:
            made = self._norm(made, f"{path}{mlp.post_norm}")
        if layer.scalar is None:
            return nodes.one("Add", [hidden, made], f"{path}out")
        added = nodes.one("Add", [hidden, made], f"{path}unscaled" if layer.per_layer is None else f"{path}mlp.added")
        if layer.per_layer is not None and vectors is not None:
            own = self._of_vector(path, layer.per_layer, added, vectors)
            added = nodes.one("Add", [added, own], f"{path}unscaled")
        return nodes.one("Mul", [added, self.weights.computed_view(f"{path}{layer.scalar}")], f"{path}out")

    def _after_sum(self, layer: LayerSpec, streams: Streams, predicted: ir.Value, hidden: ir.Value) -> ir.Value:
        """MLP, correction of all streams [B,S,streams,H], and what the token's vector adds to them.

        Args:
            predicted: what was expected of them; hidden: the computed one [B,S,H] behind attention.
        """
        path, mlp, vectors = layer.prefix, layer.branches[1], self.vectors.get(layer.index)
        made = self._mlp(layer, self._norm(hidden, f"{path}{mlp.norm}"))
        if mlp.post_norm:
            made = self._norm(made, f"{path}{mlp.post_norm}")
        every, first = streams.corrected(layer, predicted, self.nodes.one("Add", [hidden, made], f"{path}mlp.added"))
        assert layer.per_layer is not None
        assert vectors is not None
        return streams.added(layer, every, self._of_vector(path, layer.per_layer, first, vectors))

    def _of_vector(self, path: str, add: PerLayer, hidden: ir.Value, vectors: ir.Value) -> ir.Value:
        """What a layer adds of a vector of each token: norm(projection(gelu(gate(x)) * vector))."""
        nodes, gate = self.nodes, f"{path}{add.gate}"
        active = nodes.one("Gelu", [self._product(hidden, gate)], f"{gate}.active", approximate=self._approximate)
        product = nodes.one("Mul", [active, vectors], f"{path}per_layer_product")
        return self._norm(self._product(product, f"{path}{add.projection}"), f"{path}{add.norm}")

    def _mlp(self, layer: LayerSpec, normed: ir.Value) -> ir.Value:
        """down_proj(gelu(gate_proj x) * up_proj x), of a sparse layer with few gates left."""
        nodes, path, mlp = self.nodes, layer.prefix, layer.branches[1]
        gate, up = self._products(normed, [f"{path}{reader}" for reader in mlp.entry.readers])
        if layer.sparsity:
            gate = sparse(self, gate, f"{path}{mlp.module}.gates", share=layer.sparsity)
        active = nodes.one("Gelu", [gate], f"{path}{mlp.module}.act_fn.out", approximate=self._approximate)
        product = nodes.one("Mul", [active, up], f"{path}{mlp.module}.product")
        return self._product(product, f"{path}{mlp.output}")

    def _head(self, normed: ir.Value) -> ir.Value:
        """Logits in float32, soft-capped where the model does."""
        tied, nodes, cap = self.config.tie_word_embeddings, self.nodes, self.config.final_logit_softcapping
        module = EMBEDDING if tied else HEAD
        block, candidates = self.kernels.block, self.kernels.candidates
        if candidates:
            logits = screened_head(nodes, self.weights, module, block=block, normed=normed, candidates=candidates)
        else:
            logits = whole_head(nodes, self.weights, module, block=block, normed=normed)
        if self.dtype != ir.DataType.FLOAT:
            logits = nodes.one("Cast", [logits], "logits.wide", to=ir.DataType.FLOAT.value)
        if cap is not None:
            bounded = nodes.one(
                "Tanh", [nodes.one("Mul", [logits, nodes.scalar(1 / cap)], "logits.scaled")], "logits.tanh"
            )
            logits = nodes.one("Mul", [bounded, nodes.scalar(cap)], "logits.capped")
        logits.name = LOGITS
        return logits

    def _caches(self, prefix: str, length: str) -> dict[str, ir.Shape]:
        """[B,Hk,*,D] of every layer's keys and values, by name."""
        shapes = {}
        for layer in (layer for layer in self.config.layers if layer.cache_from is None):
            positions = WINDOW_CACHE if layer.index in self.windowed else length
            for part in PARTS:
                sizes = ("batch", layer.kv_heads, positions, layer.head_dim)
                shapes[f"{prefix}.{layer.index}.{part}"] = ir.Shape(sizes)
        return shapes


def _input(name: str, dtype: ir.DataType, shape: Sequence[str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(tuple(shape)), type=ir.TensorType(dtype))
