"""EmbeddingGemma 2, text: Gemma 4's layers, whose positions see those behind them as well; texts become vectors.

Each layer adds a vector of every token that is made of its embedding alone (there is no table of them), and what leaves
the last norm is projected, token by token, to the size of a vector. `sliding_window` is a radius: tokens that far away
are seen, those beyond are not. Images and sound are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gemma_deploy.architectures import gemma4
from gemma_deploy.architectures.base import (
    FULL,
    SLIDING,
    Architecture,
    Facts,
    LayerSpec,
    LayerType,
    Patched,
    Sizes,
    part_keys,
)
from gemma_deploy.architectures.blocks import PerLayer, PerLayerTable
from gemma_deploy.architectures.gemma4 import ACTIVATION_KEY, PER_LAYER
from gemma_deploy.architectures.keys import ConfigKeys
from gemma_deploy.architectures.shared import FOUR_NORMS, HEAD_NORMS, QKV, VALUE_NORM, activation, decoder_layer
from gemma_deploy.architectures.sharing import with_vector
from gemma_deploy.names import PLE_NORM, PLE_PROJECTION

WINDOW, CONTEXT, VECTORS, DIMENSIONS = 512, 262144, 512, 768
GLOBAL_HEAD_DIM, GLOBAL_KV_HEADS = 512, 1
VECTOR_KEY, DIMENSIONS_KEY = "hidden_size_per_layer_input", "embedding_dim"
BLOCK = "ple_block"
DEFAULT_ROPE: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "default", "rope_theta": 1e6},
}
# Gemma 4's, but for the order in which its class runs what lies between.
BRANCHES = (
    replace(gemma4.BRANCHES[0], inner=(*QKV.readers, *(norm for _, norm in HEAD_NORMS), VALUE_NORM)),
    gemma4.BRANCHES[1],
)
# Of transformers' EmbeddingGemma2TextConfig: what the text_config of a published model may leave out.
TEXT_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "sliding_window": WINDOW,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    ACTIVATION_KEY: "gelu_pytorch_tanh",
    VECTOR_KEY: VECTORS,
    DIMENSIONS_KEY: DIMENSIONS,
}


def read(keys: ConfigKeys, size: Mapping[str, int], layers: int) -> Facts:
    """What config.json says about it, defaults filled in."""
    layer_types = gemma4.full_at_last(keys, layers, keys.integer("sliding_window_pattern", default=gemma4.PATTERN))
    for key, default in ((VECTOR_KEY, VECTORS), (DIMENSIONS_KEY, DIMENSIONS)):
        keys.integer(key, default=default, most=1 << 16)
    if keys.raw.get(PER_LAYER) is None:
        keys.integer("global_head_dim", default=GLOBAL_HEAD_DIM)
        keys.integer("num_global_key_value_heads", default=GLOBAL_KV_HEADS)
    else:
        gemma4.check_per_layer(keys, layers)
    if not keys.problems:
        of_most = size["num_key_value_heads"], size["head_dim"]
        sizes = [_sizes(keys.raw, kind, index, of_most) for index, kind in enumerate(layer_types)]
        gemma4.check_sizes(keys, sizes, layer_types, heads=size["num_attention_heads"])
    return Facts(
        layer_types=layer_types,
        sliding_window=keys.integer("sliding_window", default=WINDOW) if SLIDING in layer_types else None,
        rope=gemma4.ropes(keys, layer_types, DEFAULT_ROPE),
        query_pre_attn_scalar=1.0,  # scores are not scaled: the norms of queries and keys carry it
        max_position_embeddings=keys.integer("max_position_embeddings", default=CONTEXT),
        hidden_activation=activation(keys, ACTIVATION_KEY),
    )


def per_layer(config: Sizes) -> PerLayerTable:
    """The vectors that layers add; no table has any of them."""
    return PerLayerTable(0, len(config.layer_types), config.raw.get(VECTOR_KEY, VECTORS), PLE_PROJECTION, PLE_NORM)


def layer(config: Sizes, index: int) -> LayerSpec:
    """What layer `index` computes."""
    kind = config.layer_types[index]
    spec = decoder_layer(
        config,
        index,
        branches=BRANCHES,
        norms=FOUR_NORMS,
        attention_scale=1.0,
        head_norms=HEAD_NORMS,
        sizes=_sizes(config.raw, kind, index, (config.num_key_value_heads, config.head_dim)),
    )
    window = None if spec.window is None else 2 * spec.window + 1
    spec = replace(spec, window=window, value_norm=VALUE_NORM, scalar="layer_scalar")
    inside = (f"{BLOCK}.{name}" for name in (PerLayer.gate, PerLayer.projection, PerLayer.norm))
    return with_vector(spec, PerLayer(per_layer(config).size, *inside))


def keys_of_part(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    """Keys of config.json by which the patched classes have these layers, and no others."""
    sizes = {
        number: {"head_dim": layer.head_dim, "num_key_value_heads": layer.kv_heads}
        for number, layer in enumerate(layers)
    }
    return {**part_keys(layers), PER_LAYER: sizes, "is_part": True}


def _sizes(raw: Mapping[str, Any], kind: LayerType, index: int, of_most: tuple[int, int]) -> tuple[int, int]:
    """KV heads and head_dim of a layer.

    Args:
        of_most: those that the config has for all.
    """
    if raw.get(PER_LAYER) is not None:
        return gemma4.given_sizes(raw, index, of_most)
    if kind != FULL:
        return of_most
    return raw.get("num_global_key_value_heads", GLOBAL_KV_HEADS), raw.get("global_head_dim", GLOBAL_HEAD_DIM)


EMBEDDING_GEMMA2 = Architecture(
    name="EmbeddingGemma 2",
    model_type="embedding_gemma2_text",
    transformers_type="embedding_gemma2_text",
    causal_class="EmbeddingGemma2TextModel",
    genai_type="",
    activation_key=ACTIVATION_KEY,
    patched=Patched(
        configuration="configuration_embedding_gemma2_vacc",
        config_class="EmbeddingGemma2TextConfig",
        modeling="modeling_embedding_gemma2_vacc",
        stack="EmbeddingGemma2TextModel",
        causal=None,
        classifier=None,
    ),
    gguf=None,
    read=read,
    layer=layer,
    branches=BRANCHES,
    multimodal=("embedding_gemma2",),
    text_defaults=TEXT_DEFAULTS,
    norm_offset=0.0,
    encoder=True,
    per_layer=per_layer,
    token_size=lambda config: config.raw.get(DIMENSIONS_KEY, DIMENSIONS),
    part_keys=keys_of_part,
    positions_first=True,
)
