"""The patched model without weights: every parameter is a zero-storage tensor of the right shape and dtype.

Second step of the export: ModelConfig -> torch module with one decoder layer of each template. Holds no memory,
whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.graph.collectives import RankEmbedding, RankExperts, ReducedLinear, mean_over_ranks
from gemma_deploy.names import LAYERS, PER_LAYER_TABLE, TOKEN_PROJECTION
from gemma_deploy.partition.ranks import row_blocks, sharding
from gemma_deploy.patched import one_layer_of_each_template, patched_causal, patched_module, set_parameter
from gemma_deploy.quantization.rescaling import OF_VECTORS, Rescaling
from gemma_deploy.schemes import Codes, Form, Storage

INT8 = ("w8a16", "w8a16_folded")
TORCH_DTYPES = dict.fromkeys(("fp32", "bf16", *INT8), torch.float32) | {"fp16": torch.float16}


@dataclass(frozen=True)
class Skeleton:
    """A weightless patched model with one layer of each template.

    Args:
        model: the causal LM, or the stack of an encoder, beside no head; layer k of it is that of every layer whose
            template is that of `templates[k]`.
        dtype: of activations.
        ranks: among which it is divided; the model is one rank's share.
        in_float32: rotary embedding, scores and LM head are float32, whatever the rest is. Rounding them to float16
        cost
            the real 270M more than all other roundings together (KL 1.6e-5, without 5e-6).
    """

    model: nn.Module
    templates: tuple[LayerSpec, ...]
    dtype: torch.dtype
    in_float32: bool
    ranks: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of attention, each once."""
        return tuple(dict.fromkeys(layer.kind for layer in self.templates))

    @property
    def adds_vectors(self) -> bool:
        """Whether layers add a vector for each token."""
        return any(layer.per_layer is not None for layer in self.templates)

    @property
    def streams(self) -> int:
        """How many streams layers carry along; 0 where there is one alone, without an axis of its own."""
        altup = self.templates[0].altup
        return 0 if altup is None else altup.streams

    @property
    def score_dtype(self) -> torch.dtype:
        """The dtype of attention scores, masks, cos and sin."""
        return torch.float32 if self.in_float32 else self.dtype


def build_skeleton(
    config: ModelConfig,
    scheme: Form,
    *,
    iter_num: int,
    context: int,
    keep_last: bool,
    embed_scale: str = "exact",
    rescaling: Rescaling | None = None,
    ranks: int = 1,
    storage: Storage | None = None,
) -> Skeleton:
    """Build the patched model for tracing.

    Args:
        iter_num: 0 prefill, 1 decode.
        context: rows of the rotary tables.
        keep_last: put the strided slice before the LM head.
        rescaling: what of a float16 graph is stored smaller or computed in float32.
        ranks: build one rank's share.
        storage: bits and groups of the int8 schemes' codes; int8 per row by default.

    """
    templates = config.templates
    model = patched_causal(
        config,
        **one_layer_of_each_template(config),
        iter_num=iter_num,
        insert_slice=keep_last,
        embed_scale=embed_scale,
    )
    dtype, rescaling = TORCH_DTYPES[scheme], rescaling or Rescaling()
    model.model.embed_tokens.divisor = 2.0**rescaling.residual
    if config.per_layer is not None and config.per_layer.rows:
        model.model.embed_tokens_per_layer.divisor = 2.0 ** rescaling.of(f"{PER_LAYER_TABLE}.out")
    _store(model, config, scheme, dtype, ranks, storage or Storage())
    if scheme == "fp16":
        _rescale(model, templates, rescaling)
    if ranks > 1:
        _divide(model, templates, ranks, in_float32=scheme == "fp16")
    for rotary in model.model.rotary.values():
        rotary.freeze(*(_zeros((context, rotary.head_dim // 2), torch.float32) for _ in range(2)))
        rotary.in_float32 = scheme == "fp16"
    return Skeleton(model.eval(), templates, dtype, scheme == "fp16", ranks)


def _store(
    model: nn.Module, config: ModelConfig, scheme: Form, dtype: torch.dtype, ranks: int, storage: Storage
) -> None:
    """Give every module its zero-storage weights in the form the artifact stores them."""
    weight_dtype = torch.bfloat16 if scheme == "bf16" else dtype
    quantization, norm = patched_module("quantization_vacc"), patched_module("layers_vacc").RMSNorm
    small = {f"model.layers.{k}.{name}" for k, layer in enumerate(config.templates) for name in layer.small}
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or (child is model.lm_head and config.tie_word_embeddings):
                continue
            if f"{path}.{name}" in small:
                child.weight = _kept(child.weight.shape, torch.float32)
                continue
            shape = _share(f"{path}.{name}", (child.out_features, child.in_features), config, ranks)
            codes = storage.of(f"{path}.{name}")
            if scheme in INT8 and codes:
                new = quantization.quantized_linear(*_codes(shape, codes))
            elif scheme in INT8:
                new = quantization.StoredLinear(_zeros(shape, torch.float16))
            elif scheme == "bf16" or f"{path}.{name}" == TOKEN_PROJECTION:  # computed in float32
                new = quantization.StoredLinear(_zeros(shape, weight_dtype))
            else:
                child.weight = _kept(shape, weight_dtype)
                continue
            setattr(parent, name, new)
        if isinstance(parent, norm) and parent.weight is not None:  # computes in float32: stored so in every scheme
            parent.weight = _kept(parent.weight.shape, torch.float32)
    for layer, module in zip(config.templates, model.model.layers, strict=True):
        if layer.scalar is not None:
            module.register_buffer(layer.scalar, _zeros((1,), torch.float32))
        if layer.altup is not None:
            set_parameter(module, layer.altup.scale, _kept((layer.hidden_size,), torch.float32))
        if layer.experts is not None:
            _store_experts(module, layer, scheme, weight_dtype, ranks=ranks, storage=storage)
    _store_table(model, config, scheme, dtype, ranks, storage)
    if config.per_layer is not None and config.per_layer.rows:
        _store_vectors(model, config, scheme, dtype, ranks, storage)


def _store_experts(
    module: nn.Module, layer: LayerSpec, scheme: Form, weight_dtype: torch.dtype, *, ranks: int, storage: Storage
) -> None:
    """The same for the experts of a layer and the vectors of their router; its matrix is a linear."""
    assert layer.experts is not None
    stack = patched_module("experts_vacc").Stack
    for name in (layer.experts.router_scale, layer.experts.expert_scale):
        set_parameter(module, name, _kept(module.get_parameter(name).shape, torch.float32))
    for name, (count, *matrix) in layer.experts.stacks(layer.hidden_size).items():
        shape = (count // ranks, *matrix)
        owner, _, last = name.rpartition(".")
        if scheme in INT8:
            codes = storage.linear(name)
            made = stack(_zeros(shape, torch.int8), _zeros(codes.scale_shape(shape), torch.float32))
        elif scheme in ("bf16", "fp16"):
            made = stack(_zeros(shape, weight_dtype))
        else:
            set_parameter(module, name, _kept(shape, weight_dtype))
            continue
        delattr(module.get_submodule(owner), last)
        module.set_submodule(name, made)


def _kept(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(_zeros(shape, dtype), requires_grad=False)


def _share(module: str, shape: tuple[int, int], config: ModelConfig, ranks: int) -> tuple[int, int]:
    """[out, in] of one rank; every rank's is the same.

    Args:
        module: path in the skeleton, whose layers are the templates.
    """
    axis = sharding(f"{module}.weight")
    if ranks == 1 or axis is None:
        return shape
    if axis == "columns":
        return shape[0], shape[1] // ranks
    layer = config.templates[int(module.split(".")[2])] if module.startswith(LAYERS) else None
    blocks = row_blocks(f"{module}.weight", shape[0], layer, rank=0, ranks=ranks)
    return sum(stop - start for start, stop in blocks), shape[1]


def _divide(model: nn.Module, templates: Sequence[LayerSpec], ranks: int, *, in_float32: bool) -> None:
    """Put what ranks say to each other around the shares."""
    stored = patched_module("quantization_vacc").StoredLinear
    for layer, module in zip(templates, model.model.layers, strict=True):
        if (experts := layer.experts) is not None:
            own = RankExperts(module.get_submodule(experts.module), experts.count // ranks, in_float32=in_float32)
            module.set_submodule(experts.module, own)
    for path, parent in list(model.named_modules()):
        if getattr(parent, "quantile", None) is not None:  # of gates, of which a rank has some
            parent.mean_of = partial(mean_over_ranks, ranks=ranks)
        for name, child in list(parent.named_children()):
            if sharding(f"{path}.{name}.weight") == "columns":
                setattr(parent, name, ReducedLinear(stored(child.weight) if in_float32 else child, in_float32))
    table = model.model.embed_tokens
    model.model.embed_tokens = RankEmbedding(table, table.weight.shape[0])
    if (vectors := getattr(model.model, "embed_tokens_per_layer", None)) is not None:
        model.model.embed_tokens_per_layer = RankEmbedding(vectors, vectors.weight.shape[0])


def _rescale(model: nn.Module, templates: Sequence[LayerSpec], rescaling: Rescaling) -> None:
    """Make parameters of what rescaling changes from layer to layer, and widen what no power of two can save."""
    stored, blocks = patched_module("quantization_vacc").StoredLinear, patched_module("layers_vacc")
    for module in list(model.modules()):
        if isinstance(module, blocks.RMSNorm):
            del module.eps
            module.register_buffer("eps", _zeros((1,), torch.float32))
        elif isinstance(module, blocks.Attention):
            del module.scaling
            module.register_buffer("scaling", _zeros((1,), torch.float32))
            module.wide_scores = True
    for layer, module in zip(templates, model.model.layers, strict=True):
        if layer.experts is not None:
            module.wide_experts = True
        for branch in (branch for branch in layer.branches if branch.module in rescaling.wide):
            module.get_submodule(branch.module).in_float32 = True
            for reader in branch.entry.readers:
                module.set_submodule(reader, stored(module.get_submodule(reader).weight))
        if layer.per_layer is not None and OF_VECTORS in rescaling.wide:
            module.per_layer_in_float32 = True
            module.set_submodule(layer.per_layer.gate, stored(module.get_submodule(layer.per_layer.gate).weight))
        if layer.altup is not None:
            module.altup.in_float32 = module.mlp.wide_statistics = True
    if templates[0].altup is not None:
        stack = model.model
        stack.streams_in_float32, stack.divisor = True, 2.0**rescaling.residual
        for projections in (stack.altup_projections, stack.altup_unembed_projections):
            for number, projection in enumerate(projections):
                projections[number] = stored(projection.weight)
    if model.lm_head is not None:
        model.lm_head = stored(model.lm_head.weight)


def _store_table(
    model: nn.Module, config: ModelConfig, scheme: Form, dtype: torch.dtype, ranks: int, storage: Storage
) -> None:
    weight_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(scheme, torch.float16)
    quantization = patched_module("quantization_vacc")
    embed = model.model.embed_tokens
    shape = _share("embed_tokens", (config.vocab_size, config.hidden_size), config, ranks)
    scale = embed.scale_value(dtype)
    if scheme in INT8 and storage.table:
        weight, row_scale = _codes(shape, storage.table)
        if scheme == "w8a16_folded" and storage.table.groupsize is None and config.head_reads_table:
            scale = _zeros((config.hidden_size,), torch.float32)
        model.model.embed_tokens = quantization.QuantizedEmbedding(weight, row_scale, scale, dtype)
        head: nn.Module = quantization.quantized_linear(weight, row_scale)
    elif scheme == "bf16" or scheme in INT8:
        weight = _zeros(shape, weight_dtype)
        model.model.embed_tokens = quantization.StoredEmbedding(weight, scale, dtype)
        head = quantization.StoredLinear(weight)
    else:
        embed.weight = nn.Parameter(_zeros(shape, weight_dtype), requires_grad=False)
        head = model.lm_head
        if config.tie_word_embeddings and head is not None:
            head.weight = embed.weight
    if config.tie_word_embeddings and model.lm_head is not None:
        model.lm_head = head


def _store_vectors(
    model: nn.Module, config: ModelConfig, scheme: Form, dtype: torch.dtype, ranks: int, storage: Storage
) -> None:
    """The table of vectors of all layers: codes are looked up by row, and only those rows become numbers."""
    quantization, embed = patched_module("quantization_vacc"), model.model.embed_tokens_per_layer
    table = config.per_layer
    assert table is not None  # of a model that has one
    shape = _share("embed_tokens_per_layer", (table.rows, table.width), config, ranks)
    scale = embed.scale_value(dtype) / embed.divisor
    codes = storage.of(PER_LAYER_TABLE) if scheme in INT8 else None
    if codes is not None:
        made: nn.Module = quantization.QuantizedEmbedding(*_codes(shape, codes), scale, dtype)
    else:
        stored = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(scheme, torch.float16)
        made = quantization.StoredEmbedding(_zeros(shape, stored), scale, dtype)
    model.model.embed_tokens_per_layer = made


def _codes(shape: tuple[int, int], codes: Codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and scale. 4-bit codes are traced as int8, and get their type with their data (external.py)."""
    return _zeros(shape, torch.int8), _zeros(codes.scale_shape(shape), torch.float32)


def _zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape that owns one element (stride 0)."""
    return torch.zeros((), dtype=dtype).expand(shape)
