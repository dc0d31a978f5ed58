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

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import EXACT_GELU, Branch, LayerSpec
from gemma_deploy.backends.onnxruntime.head import screened_head, whole_head
from gemma_deploy.backends.onnxruntime.linears import Matrix, product_of, rounded_tokens
from gemma_deploy.backends.onnxruntime.lora import Updates
from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.backends.onnxruntime.options import ALL, Kernels
from gemma_deploy.backends.onnxruntime.padding import Tokens, real_tokens_first
from gemma_deploy.backends.onnxruntime.weights import Weights
from gemma_deploy.backends.onnxruntime.window import WINDOW_CACHE, windowed_layers
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.errors import ExportError
from gemma_deploy.graph.contract import AdapterSlots
from gemma_deploy.graph.external import Row
from gemma_deploy.names import COLUMN_FACTOR, EMBEDDING, HEAD, MICROSOFT, NORM

OPSET, IR_VERSION = 23, 11
EMBEDDED, NORMED, LOGITS = "model.embed_tokens.out", "model.norm.out", "logits"


def build_decoder(
    config: ModelConfig,
    kernels: Kernels,
    rows: Iterable[Row],
    *,
    location: str,
    embed_scale: float,
    adapters: AdapterSlots | None = None,
) -> ir.Model:
    """The graph of an artifact; its weights are views of the parameter file.

    Args:
        rows: of the parameter file, which is `location` beside the graph.
        embed_scale: by which rows of the table are multiplied, where the file has no factor for each column.
        adapters: what it takes of an adapter, as inputs that are nothing by default (lora.py); None: nothing.

    Raises:
        ExportError: graph and file disagree.
    """
    made = Decoder(config, kernels, rows, location=location, embed_scale=embed_scale)
    if adapters is not None:
        made.updates = Updates(made.nodes, adapters)
        made.weights.used.update(name for name in made.weights.rows if name.endswith(f".{COLUMN_FACTOR}"))
    return made.model()


def linears_of(config: ModelConfig) -> frozenset[str]:
    """Module paths of the linears of every layer."""
    return frozenset(f"{layer.prefix}{linear.name}" for layer in config.layers for linear in layer.linears)


@dataclass(frozen=True)
class _Shared:
    """Values that every layer reads, computed once."""

    tokens: Tokens
    caches: dict[str, ir.Value]  # past_key_values.{i}.{key|value}


class Decoder:
    """The graph of a decoder in the making; an encoder's shares its layers. Arguments as of `build_decoder`."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, rows: Iterable[Row], *, location: str, embed_scale: float
    ) -> None:
        self.config, self.kernels, self.embed_scale = config, kernels, embed_scale
        self.nodes = Nodes()
        self.weights = Weights(self.nodes, rows, location)
        self.weights.norm_offset = config.architecture.norm_offset
        self.windowed = windowed_layers(config) if kernels.windowed else ()
        self.updates: Updates | None = None
        half = self.weights.dtype(f"{EMBEDDING}.weight") == "bfloat16"
        self.dtype = self.weights.computed = ir.DataType.BFLOAT16 if half else ir.DataType.FLOAT

    def model(self) -> ir.Model:
        """Embedding, layers, the last layer's second half on one position, head."""
        config, nodes = self.config, self.nodes
        ids = _input("input_ids", ir.DataType.INT64, ("batch", "sequence"))
        mask = _input("attention_mask", ir.DataType.INT64, ("batch", "total_sequence"))
        caches = self._caches("past_key_values", "past_sequence").items()
        past = {name: ir.Value(name=name, shape=shape, type=ir.TensorType(self.dtype)) for name, shape in caches}
        every = self.kernels.logits == ALL
        tokens = real_tokens_first(nodes, ids, mask, windowed=bool(self.windowed), every=every)
        hidden = self._embed(tokens.ids)
        shared = _Shared(tokens, past)
        attended, residual, *present = self._layers(hidden, shared)
        if not every:
            attended, residual = self._chosen(tokens, attention=attended, residual=residual)
        normed = self._norm(self._after_attention(config.layers[-1], attended, residual), NORM)
        if every:
            (normed,) = self._chosen(tokens, normed=normed)
        logits = self._head(normed)
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(("batch", "sequence" if every else 1, config.vocab_size))
        caches = self._caches("present", "total_sequence").items()
        for value, (name, shape) in zip(present, caches, strict=True):
            value.name, value.shape, value.type = name, shape, ir.TensorType(self.dtype)
        if left := self.weights.unused():
            raise ExportError(
                "graph and parameter file disagree",
                problems=[f"{name} is in the file but the graph does not read it" for name in left],
                next_step="this is a bug: report it",
            )
        graph = ir.Graph(
            [ids, mask, *past.values(), *(self.updates.inputs if self.updates else ())],
            [logits, *present],
            nodes=nodes.nodes,
            initializers=list(nodes.initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="gemma-deploy")

    def _chosen(self, tokens: Tokens, **values: ir.Value) -> list[ir.Value]:
        """[B,S,*] -> [B,N,*] of the tokens whose logits are wanted, by name."""
        return [
            self.nodes.one("GatherND", [value, tokens.wanted], f"{name}.chosen", batch_dims=1)
            for name, value in values.items()
        ]

    def _layers(self, hidden: ir.Value, shared: _Shared) -> list[ir.Value]:
        """[B,S,H] -> what the last layer's attention gives and the residual beside it, then all caches."""
        caches: list[ir.Value] = []
        attended = hidden
        for layer in self.config.layers:
            attended, *present = self._attention(layer, hidden, shared)
            caches += present
            if layer is not self.config.layers[-1]:
                hidden = self._after_attention(layer, attended, hidden)
        return [attended, hidden, *caches]

    def _embed(self, ids: ir.Value) -> ir.Value:
        table, nodes = EMBEDDING, self.nodes
        matrix = self._matrix(table)
        if matrix.dense:
            rows = nodes.one(
                "Gather", [self.weights.view([f"{table}.weight"], f"{table}.weight"), ids], f"{table}.rows"
            )
            if self.weights.dtype(f"{table}.weight") != "float32":
                rows = nodes.one("Cast", [rows], f"{table}.wide", to=ir.DataType.FLOAT.value)
        else:
            rows = matrix.chosen_rows(nodes, ids, f"{table}.rows")
        columns = f"{table}.column_scale"
        factor = self.weights.view([columns], columns) if self.weights.has(columns) else nodes.scalar(self.embed_scale)
        if self.dtype == ir.DataType.FLOAT:
            return nodes.one("Mul", [rows, factor], EMBEDDED)
        return nodes.one("Cast", [nodes.one("Mul", [rows, factor], f"{table}.scaled")], EMBEDDED, to=self.dtype.value)

    def _attention(self, layer: LayerSpec, hidden: ir.Value, shared: _Shared) -> list[ir.Value]:
        """Attention's output [B,S,heads*D] before o_proj, and the layer's two caches."""
        path, nodes, norms = layer.prefix, self.nodes, dict(layer.head_norms)
        attention = layer.branches[0]
        readers, makers = attention.entry.readers, dict(layer.caches)
        # Attention reads all three from one value as well, unless something stands between.
        made = self._products(
            self._norm(hidden, f"{path}{attention.norm}"), [f"{path}{name}" for name in readers], apart=bool(norms)
        )
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
        rotary = [self.weights.rotary(layer.kind, table) for table in ("cos", "sin")]
        past = [shared.caches[f"past_key_values.{layer.index}.{part}"] for part in ("key", "value")]
        tokens = shared.tokens
        counts = [] if tokens.read is None else [*[None] * 7, tokens.read]  # query_seqlens is input 16
        return nodes.many(
            "GroupQueryAttention",
            [*made, *[None] * (3 - len(made)), *past, tokens.seqlens, tokens.total, *rotary, *counts],
            [f"{path}{attention.module}.out", f"{path}present.key", f"{path}present.value"],
            domain=MICROSOFT,
            num_heads=layer.heads,
            kv_num_heads=layer.kv_heads,
            scale=float(layer.attention_scale),
            softcap=self.config.attn_logit_softcapping,
            local_window_size=layer.window,
            sliding_window_cache=1 if layer.index in self.windowed else None,
            do_rotary=1,
        )

    def _after_attention(self, layer: LayerSpec, attended: ir.Value, residual: ir.Value) -> ir.Value:
        """o_proj, MLP, and the norms and sums around them: [B,S,heads*D], [B,S,H] -> [B,S,H]."""
        path, nodes = layer.prefix, self.nodes
        attention, mlp = layer.branches
        made = self._product(attended, f"{path}{attention.output}")
        if attention.post_norm:
            made = self._norm(made, f"{path}{attention.post_norm}")
        normed, _, _, hidden = nodes.many(
            "SkipSimplifiedLayerNormalization",
            [made, residual, self.weights.gain(f"{path}{mlp.norm}")],
            [f"{path}{mlp.norm}.out", "", "", f"{path}residual"],
            domain=MICROSOFT,
            epsilon=self.config.rms_norm_eps,
        )
        made = self._mlp(path, mlp, normed)
        if mlp.post_norm:
            made = self._norm(made, f"{path}{mlp.post_norm}")
        if layer.scalar is None:
            return nodes.one("Add", [hidden, made], f"{path}out")
        added = nodes.one("Add", [hidden, made], f"{path}unscaled")
        return nodes.one("Mul", [added, self.weights.number(f"{path}{layer.scalar}")], f"{path}out")

    def _mlp(self, path: str, mlp: Branch, normed: ir.Value) -> ir.Value:
        """down_proj(gelu(gate_proj x) * up_proj x)."""
        nodes = self.nodes
        gate, up = self._products(normed, [f"{path}{reader}" for reader in mlp.entry.readers])
        approximate = "none" if self.config.hidden_activation == EXACT_GELU else "tanh"
        active = nodes.one("Gelu", [gate], f"{path}{mlp.module}.act_fn.out", approximate=approximate)
        product = nodes.one("Mul", [active, up], f"{path}{mlp.module}.product")
        return self._product(product, f"{path}{mlp.output}")

    def _product(self, x: ir.Value, module: str) -> ir.Value:
        return self._products(x, [module])[0]

    def _products(self, x: ir.Value, modules: Sequence[str], apart: bool = True) -> list[ir.Value]:
        """What linears make of one input: integer products apart, all others that are stored alike in one.

        Args:
            apart: split what one product makes, unless that is what all of them make.
        """
        if self.updates is None:
            return self._plain_products(x, modules, apart)
        made = self._plain_products(x, modules, apart=True)
        return [self.updates.added(x, module, value) for module, value in zip(modules, made, strict=True)]

    def _plain_products(self, x: ir.Value, modules: Sequence[str], apart: bool) -> list[ir.Value]:
        """`_products` of the weights alone."""
        nodes, joined = self.nodes, product_of(modules[0])
        if self._matrix(modules[0]).integer:
            tokens = rounded_tokens(nodes, x, joined, in_14_bits=modules[0] in self.kernels.in_14_bits)
            return [self._matrix(module).integer_product(nodes, tokens, f"{module}.out") for module in modules]
        alike = [list(run) for _, run in groupby(modules, lambda module: self.weights.dtype(f"{module}.weight"))]
        made: list[ir.Value] = []
        for run in alike:
            name = joined if len(alike) == 1 else "_".join([run[0], *(one.rpartition(".")[2] for one in run[1:])])
            product = self._matrix(*run, name=name).product(nodes, x, f"{name}.out")
            if len(run) == 1 or (len(alike) == 1 and not apart):
                made.append(product)
            else:
                heights = nodes.numbers(*(self._matrix(module).rows for module in run))
                made += nodes.many("Split", [product, heights], [f"{module}.out" for module in run], axis=-1)
        return made

    def _matrix(self, *modules: str, name: str = "") -> Matrix:
        return Matrix(self.weights, modules, name or modules[0], block=self.kernels.block)

    def _norm(self, x: ir.Value, norm: str, size: int | None = None) -> ir.Value:
        """RMSNorm; of `size` channels, where it has no weight."""
        gain = self.weights.gain(norm) if size is None else self.weights.ones(size)
        return self.nodes.one(
            "RMSNormalization", [x, gain], f"{norm}.out",
            axis=-1, epsilon=self.config.rms_norm_eps, stash_type=1,
        )  # fmt: skip

    def _head_norm(self, x: ir.Value, norm: str, heads: int, dim: int) -> ir.Value:
        """The norm of every head on its own."""
        nodes = self.nodes
        apart = nodes.one("Reshape", [x, nodes.numbers(0, -1, dim)], f"{norm}.heads")
        normed = self._norm(apart, norm, None if self.weights.has(f"{norm}.weight") else dim)
        return nodes.one("Reshape", [normed, nodes.numbers(0, -1, heads * dim)], f"{norm}.joined")

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
        for layer in self.config.layers:
            positions = WINDOW_CACHE if layer.index in self.windowed else length
            for part in ("key", "value"):
                sizes = ("batch", layer.kv_heads, positions, layer.head_dim)
                shapes[f"{prefix}.{layer.index}.{part}"] = ir.Shape(sizes)
        return shapes


def _input(name: str, dtype: ir.DataType, shape: Sequence[str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(tuple(shape)), type=ir.TensorType(dtype))


def embedding_scale(hidden_size: int, rounding: str) -> float:
    """sqrt(hidden_size) in float32, by way of bfloat16 where `rounding` is "bf16"."""
    root = np.float32(math.sqrt(hidden_size))
    if rounding == "bf16":
        import ml_dtypes

        root = np.float32(root.astype(ml_dtypes.bfloat16))
    return float(root)
