"""Which tensors a checkpoint must hold, and their shapes, in model order."""

from __future__ import annotations

from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.names import (
    EMBEDDING_WEIGHT,
    HEAD_WEIGHT,
    NORM_WEIGHT,
    PER_LAYER_TABLE,
    STREAM_PROJECTION,
    STREAM_UNEMBED,
    TOKEN_PROJECTION,
)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes ([out, in] for linears) in model order; no lm_head.weight when it is tied.

    Of an encoder, the dense layers behind it in the place of a head.
    """
    table = (config.vocab_size, config.hidden_size)
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING_WEIGHT: table}
    if (vectors := config.per_layer) is not None:
        if vectors.rows:
            tensors[f"{PER_LAYER_TABLE}.weight"] = (vectors.rows, vectors.width)
        tensors[f"{vectors.projection}.weight"] = (vectors.width, config.hidden_size)
        tensors[f"{vectors.norm}.weight"] = (vectors.size,)
    if config.altup is not None:
        square, others = (config.hidden_size, config.hidden_size), range(config.altup.streams - 1)
        tensors |= {f"{name}.{i}.weight": square for name in (STREAM_PROJECTION, STREAM_UNEMBED) for i in others}
    for layer in config.layers:
        tensors |= {f"{layer.prefix}{name}": shape for name, shape in layer.tensors().items()}
    tensors[NORM_WEIGHT] = (config.hidden_size,)
    if config.projects_tokens:
        tensors[f"{TOKEN_PROJECTION}.weight"] = (config.token_size, config.hidden_size)
    if config.architecture.encoder:
        return tensors | ({} if config.sentence is None else config.sentence.tensors())
    if not config.tie_word_embeddings:
        tensors[HEAD_WEIGHT] = table
    if config.drafting is not None:
        tensors |= config.drafting.tensors(config.hidden_size, config.vocab_size)
    return tensors


def coefficients(config: ModelConfig) -> frozenset[str]:
    """Matrices of a few numbers, which every artifact has in float32."""
    return frozenset(f"{layer.prefix}{name}.weight" for layer in config.layers for name in layer.small)


def never_coded(config: ModelConfig) -> frozenset[str]:
    """Matrices that no artifact holds as codes: coefficients, routers of experts, what joins a drafter to its model."""
    routers = {f"{layer.prefix}{layer.experts.router}.weight" for layer in config.layers if layer.experts is not None}
    joining = config.drafting.tensors(config.hidden_size, config.vocab_size) if config.drafting is not None else ()
    return coefficients(config) | routers | set(joining)


def unread_tensors(config: ModelConfig) -> frozenset[str]:
    """Tensors that files may hold and the model does not read: keys and values of layers that share those of others."""
    kinds = ("k_proj", "v_proj", "k_norm", "v_norm")
    sharing = [layer for layer in config.layers if layer.cache_from is not None]
    return frozenset(f"{layer.prefix}self_attn.{kind}.weight" for layer in sharing for kind in kinds)
