"""The whole decoder as one dynamic graph, top to bottom.

input_ids [B,S] int64, attention_mask [B,T] int64, past_key_values.{i}.key/value [B,Hk,*,D] -> logits [B,1,V] float32,
present.{i}.key/value: the names and meanings that onnxruntime-genai expects. GroupQueryAttention rotates, masks, and
writes into the cache where past and present are one buffer. Padding stands on the right of a prompt; logits are those
of each row's last token, which is chosen as soon as the last layer has attended.

A bfloat16 graph is for GPU providers: ONNX Runtime has no such kernels for a CPU. Embedding and soft cap are float32 in
it, logits leave in float32, norms are computed in float32 (stash_type).

With `Kernels.integer` all layers up to that point stand in an If twice: integer products for prompts, the block kernel
for a few tokens at a time. Both read the same bytes of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.ort.linears import Matrix, Tokens, product_of, rounded_tokens
from gemma_deploy.backends.ort.nodes import MICROSOFT, Nodes
from gemma_deploy.backends.ort.options import INTEGER_FROM, Kernels
from gemma_deploy.backends.ort.weights import Weights
from gemma_deploy.checkpoint.config import SLIDING, ModelConfig
from gemma_deploy.checkpoint.expected import expected_tensors
from gemma_deploy.errors import ExportError
from gemma_deploy.graph.external import Row

OPSET, IR_VERSION = 23, 11
TABLE = "model.embed_tokens"
EMBEDDED, NORMED, LOGITS = "model.embed_tokens.out", "model.norm.out", "logits"
# Bytes of the LM head in one product. A session maps a matrix while it packs it, so that the largest one decides the
# peak of loading; several cost 0.1 ms a token.
HEAD_BYTES = 32 << 20
CHOSEN = ("attention", "residual")  # what leaves the last layer's attention


def build_decoder(
    config: ModelConfig, kernels: Kernels, rows: Iterable[Row], location: str, embed_scale: float
) -> ir.Model:
    """The graph of an artifact; its weights are views of the parameter file.

    Args:
        rows: of the parameter file, which is `location` beside the graph.
        embed_scale: by which rows of the table are multiplied, where the file has no factor for each column.

    Raises:
        ExportError: graph and file disagree.
    """
    return _Decoder(config, kernels, rows, location, embed_scale).model()


def integer_linears(config: ModelConfig) -> frozenset[str]:
    """Linears that stand in the branches: all but those behind the last layer's attention, which see one token."""
    last = f"model.layers.{config.num_hidden_layers - 1}."
    behind = (f"{last}self_attn.o_proj", f"{last}mlp.")
    names = (name.removesuffix(".weight") for name in expected_tensors(config) if name.endswith("_proj.weight"))
    return frozenset(name for name in names if not name.startswith(behind))


@dataclass(frozen=True)
class _Shared:
    """Values that every layer reads, computed once outside the branches."""

    seqlens: ir.Value  # [B] int32: real tokens of each row, less one
    total: ir.Value  # int32: columns of the mask
    caches: dict[str, ir.Value]  # past_key_values.{i}.{key|value}


class _Decoder:
    def __init__(
        self, config: ModelConfig, kernels: Kernels, rows: Iterable[Row], location: str, embed_scale: float
    ) -> None:
        self.config, self.kernels, self.embed_scale = config, kernels, embed_scale
        self.top = Nodes()
        self.weights = Weights(self.top, rows, location)
        self.layers = config.num_hidden_layers
        self.last = self.layers - 1
        half = self.weights.dtype(f"{TABLE}.weight") == "bfloat16"
        self.dtype = self.weights.computed = ir.DataType.BFLOAT16 if half else ir.DataType.FLOAT

    def model(self) -> ir.Model:
        """Embedding, layers, the last layer's second half on one position, head."""
        config, top = self.config, self.top
        ids = _input("input_ids", ir.DataType.INT64, ("batch", "sequence"))
        mask = _input("attention_mask", ir.DataType.INT64, ("batch", "total_sequence"))
        past = {name: self._cache(name, "past_sequence") for name in self._cache_names("past_key_values")}
        hidden = self._embed(ids)
        lengths = top.one("ReduceSum", [mask, top.numbers(1)], "lengths", keepdims=0)
        seqlens = top.one("Cast", [top.one("Sub", [lengths, top.numbers(1)], "last")], "seqlens_k", to=6)
        total = top.one("Cast", [self._size(mask, 1, "total_length")], "total_sequence_length", to=6)
        shared = _Shared(seqlens, total, past)
        if self.kernels.integer:
            attended, residual, *present = self._branches(hidden, ids, shared)
        else:
            attended, residual, *present = self._layers(top, hidden, shared, integer=False)
        index = self._last_index(ids, lengths)
        attended, residual = (
            top.one("GatherND", [value, index], f"{name}.chosen", batch_dims=1)
            for name, value in zip(CHOSEN, (attended, residual), strict=True)
        )
        hidden = self._after_attention(top, self.last, attended, residual, integer=False)
        logits = self._head(self._norm(top, hidden, "model.norm"))
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(("batch", 1, config.vocab_size))
        for value, name in zip(present, self._cache_names("present"), strict=True):
            value.name, value.shape = name, self._cache_shape("total_sequence")
            value.type = ir.TensorType(self.dtype)
        if left := self.weights.unused():
            raise ExportError(
                "graph and parameter file disagree",
                problems=[f"{name} is in the file but the graph does not read it" for name in left],
                next_step="this is a bug: report it",
            )
        graph = ir.Graph(
            [ids, mask, *past.values()],
            [logits, *present],
            nodes=top.nodes,
            initializers=list(top.initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="gemma-deploy")

    def _branches(self, hidden: ir.Value, ids: ir.Value, shared: _Shared) -> list[ir.Value]:
        """The layers twice; a prompt takes the first."""
        top, outputs = self.top, []
        names = [*(f"layers.{name}" for name in CHOSEN), *self._cache_names("present")]
        for prefix, integer in (("prefill/", True), ("decode/", False)):
            nodes = Nodes(prefix, top)
            made = self._layers(nodes, hidden, shared, integer)
            for value in made:
                value.type = ir.TensorType(self.dtype)
            outputs.append(ir.Graph([], made, nodes=nodes.nodes, name=prefix.rstrip("/")))
        many = top.one("GreaterOrEqual", [self._size(ids, 1, "tokens"), top.numbers(INTEGER_FROM)], "is_prompt")
        return top.many("If", [many], names, then_branch=outputs[0], else_branch=outputs[1])

    def _layers(self, nodes: Nodes, hidden: ir.Value, shared: _Shared, integer: bool) -> list[ir.Value]:
        """[B,S,H] -> what the last layer's attention gives and the residual beside it, then all caches."""
        caches: list[ir.Value] = []
        attended = hidden
        for layer in range(self.layers):
            attended, *present = self._attention(nodes, layer, hidden, shared, integer)
            caches += present
            if layer < self.last:
                hidden = self._after_attention(nodes, layer, attended, hidden, integer)
        if nodes.top is not None and self.layers == 1:  # a branch cannot return what is made outside of it
            hidden = nodes.one("Identity", [hidden], "residual")
        return [attended, hidden, *caches]

    def _embed(self, ids: ir.Value) -> ir.Value:
        table, top = TABLE, self.top
        matrix = self._matrix(table)
        if matrix.dense:
            rows = top.one("Gather", [self.weights.view([f"{table}.weight"], f"{table}.weight"), ids], f"{table}.rows")
            if self.weights.dtype(f"{table}.weight") != "float32":
                rows = top.one("Cast", [rows], f"{table}.wide", to=ir.DataType.FLOAT.value)
        else:
            flat = self.weights.view([f"{table}.weight"], f"{table}.weight", dtype=ir.DataType.UINT8)
            scales = self.weights.block_scales(matrix.scales, table, matrix.columns // matrix.block)
            rows = top.one(
                "GatherBlockQuantized", [flat, ids, scales], f"{table}.rows", domain=MICROSOFT,
                bits=8, block_size=matrix.block, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
        columns = f"{table}.column_scale"
        factor = self.weights.view([columns], columns) if self.weights.has(columns) else top.scalar(self.embed_scale)
        if self.dtype == ir.DataType.FLOAT:
            return top.one("Mul", [rows, factor], EMBEDDED)
        return top.one("Cast", [top.one("Mul", [rows, factor], f"{table}.scaled")], EMBEDDED, to=self.dtype.value)

    def _attention(self, nodes: Nodes, layer: int, hidden: ir.Value, shared: _Shared, integer: bool) -> list[ir.Value]:
        """Attention's output [B,S,heads*D] before o_proj, and the layer's two caches."""
        config, path = self.config, f"model.layers.{layer}"
        kind = config.layer_types[layer]
        normed = self._norm(nodes, hidden, f"{path}.input_layernorm")
        names = [f"{path}.self_attn.{part}_proj" for part in "qkv"]
        joined = f"{path}.self_attn.qkv_proj"
        key: ir.Value | None = None
        value: ir.Value | None = None
        widths = [self.weights.shape([f"{name}.weight"])[0] for name in names]
        if integer and self._matrix(names[0]).integer:
            tokens = self._tokens(nodes, normed, names[0])
            query, key, value = (self._matrix(name).integer_product(nodes, tokens, f"{name}.out") for name in names)
        else:
            query = self._matrix(*names, name=joined).product(nodes, normed, f"{joined}.out")
            if self.config.model_type == "gemma3_text":
                split = [f"{name}.out" for name in names]
                query, key, value = nodes.many("Split", [query, nodes.numbers(*widths)], split, axis=-1)
        if self.config.model_type == "gemma3_text":
            assert key is not None
            query = self._head_norm(nodes, query, f"{path}.self_attn.q_norm", widths[0])
            key = self._head_norm(nodes, key, f"{path}.self_attn.k_norm", widths[1])
        rotary = [self.weights.rotary(kind, table) for table in ("cos", "sin")]
        past = [shared.caches[f"past_key_values.{layer}.{part}"] for part in ("key", "value")]
        window = config.sliding_window if kind == SLIDING else None
        return nodes.many(
            "GroupQueryAttention",
            [query, key, value, *past, shared.seqlens, shared.total, *rotary],
            [f"{path}.self_attn.out", f"{path}.present.key", f"{path}.present.value"],
            domain=MICROSOFT,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=float(config.query_pre_attn_scalar**-0.5),
            softcap=config.attn_logit_softcapping,
            local_window_size=window,
            do_rotary=1,
        )

    def _after_attention(
        self, nodes: Nodes, layer: int, attended: ir.Value, residual: ir.Value, integer: bool
    ) -> ir.Value:
        """o_proj, MLP, and the norms and sums around them: [B,S,heads*D], [B,S,H] -> [B,S,H]."""
        path = f"model.layers.{layer}"
        second = "post_attention_layernorm" if self.config.model_type == "gemma" else "pre_feedforward_layernorm"
        output = f"{path}.self_attn.o_proj"
        if integer and self._matrix(output).integer:
            tokens = self._tokens(nodes, attended, output)
            made = self._matrix(output).integer_product(nodes, tokens, f"{output}.out")
        else:
            made = self._matrix(output).product(nodes, attended, f"{output}.out")
        if self.config.model_type != "gemma":
            made = self._norm(nodes, made, f"{path}.post_attention_layernorm")
        normed, _, _, hidden = nodes.many(
            "SkipSimplifiedLayerNormalization",
            [made, residual, self.weights.gain(f"{path}.{second}")],
            [f"{path}.{second}.out", "", "", f"{path}.residual"],
            domain=MICROSOFT,
            epsilon=self.config.rms_norm_eps,
        )
        made = self._mlp(nodes, f"{path}.mlp", normed, integer)
        if self.config.model_type != "gemma":
            made = self._norm(nodes, made, f"{path}.post_feedforward_layernorm")
        return nodes.one("Add", [hidden, made], f"{path}.out")

    def _mlp(self, nodes: Nodes, path: str, normed: ir.Value, integer: bool) -> ir.Value:
        """down_proj(gelu(gate_proj x) * up_proj x)."""
        gate_name, up_name, down_name = (f"{path}.{part}_proj" for part in ("gate", "up", "down"))
        width, down = self.config.intermediate_size, self._matrix(down_name)
        if not (integer and down.integer):
            both = self._matrix(gate_name, up_name, name=f"{path}.gate_up_proj")
            made = both.product(nodes, normed, f"{path}.gate_up_proj.out")
            outs = [f"{gate_name}.out", f"{up_name}.out"]
            gate, up = nodes.many("Split", [made, nodes.numbers(width, width)], outs, axis=-1)
            return down.product(nodes, self._gated(nodes, path, gate, up), f"{down_name}.out")
        tokens = self._tokens(nodes, normed, gate_name)
        gate = self._matrix(gate_name).integer_product(nodes, tokens, f"{gate_name}.out")
        up = self._matrix(up_name).integer_product(nodes, tokens, f"{up_name}.out", scaled=False)
        inner = self._tokens(nodes, self._gated(nodes, path, gate, up), down_name)
        scale = nodes.one("Mul", [inner.scale, tokens.scale], f"{path}.scale")  # that of up_proj, left out before
        return down.integer_product(nodes, replace(inner, scale=scale), f"{down_name}.out")

    def _gated(self, nodes: Nodes, path: str, gate: ir.Value, up: ir.Value) -> ir.Value:
        active = nodes.one("Gelu", [gate], f"{path}.act_fn.out", approximate="tanh")
        return nodes.one("Mul", [active, up], f"{path}.product")

    def _matrix(self, *modules: str, name: str = "") -> Matrix:
        return Matrix(self.weights, modules, name or modules[0], self.kernels.block)

    def _tokens(self, nodes: Nodes, x: ir.Value, module: str) -> Tokens:
        """What a linear reads, and all others that read the same, as codes."""
        return rounded_tokens(nodes, x, product_of(module), module in self.kernels.wide)

    def _norm(self, nodes: Nodes, x: ir.Value, norm: str) -> ir.Value:
        return nodes.one(
            "RMSNormalization", [x, self.weights.gain(norm)], f"{norm}.out",
            axis=-1, epsilon=self.config.rms_norm_eps, stash_type=1,
        )  # fmt: skip

    def _head_norm(self, nodes: Nodes, x: ir.Value, norm: str, width: int) -> ir.Value:
        """The norm of every head on its own."""
        apart = nodes.one("Reshape", [x, nodes.numbers(0, -1, self.config.head_dim)], f"{norm}.heads")
        return nodes.one("Reshape", [self._norm(nodes, apart, norm), nodes.numbers(0, -1, width)], f"{norm}.joined")

    def _last_index(self, ids: ir.Value, lengths: ir.Value) -> ir.Value:
        """[B,1,1]: place of each row's last token among the new ones, padding on the right left out."""
        top = self.top
        longest = top.one("ReduceMax", [lengths, top.numbers(0)], "longest", keepdims=1)
        new = self._size(ids, 1, "new_tokens")
        before = top.one("Sub", [longest, new], "cached")
        place = top.one("Sub", [top.one("Sub", [lengths, before], "own"), top.numbers(1)], "place")
        most = top.one("Sub", [new, top.numbers(1)], "most")
        inside = top.one("Max", [top.one("Min", [place, most], "at_most"), top.numbers(0)], "inside")
        return top.one("Unsqueeze", [inside, top.numbers(1, 2)], "last_index")

    def _head(self, normed: ir.Value) -> ir.Value:
        """Logits in float32, soft-capped where the model does."""
        tied, top, cap = self.config.tie_word_embeddings, self.top, self.config.final_logit_softcapping
        module = TABLE if tied else "lm_head"
        whole = self._matrix(module)
        step = max(1, int(HEAD_BYTES / (whole.columns * (whole.bits / 8 or 4))))
        parts = [(start, min(start + step, whole.rows)) for start in range(0, whole.rows, step)]
        shares = [
            Matrix(self.weights, [module], f"lm_head.{k}", whole.block if whole.bits else 0, part).product(
                top, normed, f"lm_head.{k}.out"
            )
            for k, part in enumerate(parts)
        ]
        logits = top.one("Concat", shares, "lm_head.out", axis=-1) if len(shares) > 1 else shares[0]
        if self.dtype != ir.DataType.FLOAT:
            logits = top.one("Cast", [logits], "logits.wide", to=ir.DataType.FLOAT.value)
        if cap is not None:
            bounded = top.one("Tanh", [top.one("Mul", [logits, top.scalar(1 / cap)], "logits.scaled")], "logits.tanh")
            logits = top.one("Mul", [bounded, top.scalar(cap)], "logits.capped")
        logits.name = LOGITS
        return logits

    def _size(self, value: ir.Value, axis: int, name: str) -> ir.Value:
        """[1] int64: a dimension."""
        return self.top.one("Shape", [value], name, start=axis, end=axis + 1)

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]

    def _cache_shape(self, length: str) -> ir.Shape:
        return ir.Shape(("batch", self.config.num_key_value_heads, length, self.config.head_dim))

    def _cache(self, name: str, length: str) -> ir.Value:
        return ir.Value(name=name, shape=self._cache_shape(length), type=ir.TensorType(self.dtype))


def _input(name: str, dtype: ir.DataType, shape: Sequence[str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(tuple(shape)), type=ir.TensorType(dtype))


def embedding_scale(hidden_size: int, rounding: str) -> float:
    """sqrt(hidden_size) in float32, by way of bfloat16 where `rounding` is "bf16"."""
    root = np.float32(math.sqrt(hidden_size))
    if rounding == "bf16":
        import ml_dtypes

        root = np.float32(root.astype(ml_dtypes.bfloat16))
    return float(root)
