"""What the whole decoder is made of: linears, norms, the choice of tokens; see decoder.py for their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import onnx_ir as ir

from gemma_deploy.architectures import EXACT_GELU, LayerSpec
from gemma_deploy.backends.onnxruntime.cache_codes import PARTS, int8_attributes
from gemma_deploy.backends.onnxruntime.linears import Matrix, product_of, rounded_tokens
from gemma_deploy.backends.onnxruntime.lora import Updates
from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.backends.onnxruntime.options import Kernels
from gemma_deploy.backends.onnxruntime.padding import Tokens
from gemma_deploy.backends.onnxruntime.shared_window import Held
from gemma_deploy.backends.onnxruntime.weights import Weights
from gemma_deploy.backends.onnxruntime.window import windowed_layers
from gemma_deploy.calibration.points import cache_scale_names
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.errors import ExportError
from gemma_deploy.graph.external import Row
from gemma_deploy.names import CACHE_SCALE, EMBEDDING, MICROSOFT

OPSET, IR_VERSION = 23, 11


class DecoderParts:
    """The graph under construction, and the nodes that every part of it has; arguments as in `build_decoder`."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        rows: Iterable[Row],
        *,
        location: str,
        embed_scale: float,
        rounding: str = "exact",
    ) -> None:
        self.config, self.kernels, self.embed_scale = config, kernels, embed_scale
        self.rounding = rounding
        self.vectors: dict[int, ir.Value] = {}  # of each layer that adds some
        self.nodes = Nodes()
        self.weights = Weights(self.nodes, rows, location)
        self.weights.norm_offset = config.architecture.norm_offset
        self.held: dict[int, Held] = {}  # of layers whose caches of a window others read
        self.windowed = windowed_layers(config) if kernels.windowed else ()
        self.updates: Updates | None = None
        half = self.weights.dtype(f"{EMBEDDING}.weight") == "bfloat16"
        self.dtype = self.weights.computed = ir.DataType.BFLOAT16 if half else ir.DataType.FLOAT
        int8_cache = any(name.endswith(f".{CACHE_SCALE}") for name in self.weights.rows)
        self.cache_dtype = ir.DataType.INT8 if int8_cache else self.dtype

    def _finished(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> ir.Model:
        """The model of everything made so far.

        Raises:
            ExportError: a tensor of the parameter file is read by nothing.
        """
        if left := self.weights.unused():
            raise ExportError(
                "graph and parameter file disagree",
                problems=[f"{tensor} is in the file but the graph does not read it" for tensor in left],
                next_step="this is a bug: report it",
            )
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes.nodes,
            initializers=list(self.nodes.initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="gemma-deploy")

    def _chosen(self, tokens: Tokens, **values: ir.Value) -> list[ir.Value]:
        """[B,S,*] -> [B,N,*] of the tokens whose logits are wanted, by name."""
        return [
            self.nodes.one("GatherND", [value, tokens.wanted], f"{name}.chosen", batch_dims=1)
            for name, value in values.items()
        ]

    def _rotary(self, layer: LayerSpec) -> list[ir.Value]:
        """Cosines and sines [positions, head_dim / 2] of a layer's kind."""
        return [self.weights.rotary(layer.kind, table) for table in ("cos", "sin")]

    def _behind_tables(
        self, layer: LayerSpec, *, positions: ir.Value | None = None, read: ir.Value | None = None
    ) -> list[ir.Value | None]:
        """Inputs of a layer's GroupQueryAttention behind its rotary tables, up to the last there is.

        Args:
            positions: of the queries, position_ids; read: real tokens among the new ones, query_seqlens.
        """
        scales: list[ir.Value | None] = [None, None]
        if self.cache_dtype == ir.DataType.INT8:
            source = layer if layer.cache_from is None else self.config.layers[layer.cache_from]
            names, shape = cache_scale_names(source), (1, source.kv_heads, 1, source.head_dim)
            scales = [self.weights.view([names[part]], names[part], shape) for part in PARTS]
        inputs = [positions, None, None, *scales, None, None, read]  # attention_bias, head_sink; norms of q and k
        while inputs and inputs[-1] is None:
            inputs.pop()
        return inputs

    def _grouped(self, layer: LayerSpec) -> dict[str, Any]:
        """Domain and attributes of a layer's GroupQueryAttention."""
        return (int8_attributes() if self.cache_dtype == ir.DataType.INT8 else {}) | {
            "domain": MICROSOFT,
            "num_heads": layer.heads,
            "kv_num_heads": layer.kv_heads,
            "scale": float(layer.attention_scale),
            "softcap": self.config.attn_logit_softcapping,
            "local_window_size": layer.window,
            "sliding_window_cache": 1 if layer.index in self.windowed else None,
            "do_rotary": 1,
        }

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

    @property
    def _approximate(self) -> str:
        return "none" if self.config.hidden_activation == EXACT_GELU else "tanh"
