"""Gemma 3, text: four norms a layer, normed queries and keys, five sliding layers to a global one, a base for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_deploy.architectures.base import (
    LAYER_TYPES,
    SLIDING,
    Architecture,
    Facts,
    LayerSpec,
    LayerType,
    Patched,
    Rope,
    Sizes,
)
from gemma_deploy.architectures.gguf import Gguf, Metadata
from gemma_deploy.architectures.keys import ConfigKeys
from gemma_deploy.architectures.shared import (
    FOUR_NORMS,
    GGUF_BLOCKS,
    GGUF_FOUR_NORMS,
    GGUF_HEAD_NORMS,
    HEAD_NORMS,
    activation,
    attention,
    attention_scalar,
    attention_scalar_of_gguf,
    by_pattern,
    decoder_layer,
    gated_mlp,
    given_layer_types,
    rope,
)

ACTIVATION_KEY = "hidden_activation"
PATTERN, MOST_LAYERS = 6, 1024
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
SHAPE_27B = (62, 5376)  # layers, hidden size
# Of transformers' Gemma3TextConfig: the 4B, 12B and 27B as published leave most of them out.
TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    ACTIVATION_KEY: "gelu_pytorch_tanh",
}
BRANCHES = (
    attention(post_norm="post_attention_layernorm", head_norms=HEAD_NORMS),
    gated_mlp(norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
)


def read(keys: ConfigKeys, size: Mapping[str, int], layers: int) -> Facts:
    """What config.json says about a Gemma 3, defaults filled in."""
    layer_types = given_layer_types(keys, layers)
    if layer_types is None:
        key = "sliding_window_pattern" if "sliding_window_pattern" in keys.raw else "_sliding_window_pattern"
        layer_types = by_pattern(layers, keys.integer(key, default=PATTERN, most=MOST_LAYERS))
    return Facts(
        layer_types=layer_types,
        sliding_window=keys.integer("sliding_window") if SLIDING in layer_types else None,
        rope=ropes(keys, layer_types),
        query_pre_attn_scalar=attention_scalar(keys),
        max_position_embeddings=keys.integer("max_position_embeddings", default=131072),
        hidden_activation=activation(keys, ACTIVATION_KEY),
        attn_logit_softcapping=keys.cap("attn_logit_softcapping", None),
        final_logit_softcapping=keys.cap("final_logit_softcapping", None),
    )


def ropes(keys: ConfigKeys, layer_types: tuple[LayerType, ...]) -> dict[LayerType, Rope]:
    """Both spellings: rope_theta / rope_local_base_freq / rope_scaling, and rope_parameters with an entry per kind."""
    parameters, scaling = keys.mapping("rope_parameters"), keys.mapping("rope_scaling")
    if parameters and not any(name in parameters for name in LAYER_TYPES):
        keys.problem("rope_parameters", sorted(parameters), "one entry per layer type")
    found = {}
    for kind in (kind for kind in LAYER_TYPES if kind in layer_types):
        local = kind == SLIDING
        found[kind] = rope(
            keys,
            parameters.get(kind),
            f"rope_parameters.{kind}" if parameters else "rope_parameters",
            legacy="rope_local_base_freq" if local else "rope_theta",
            default=LOCAL_THETA if local else GLOBAL_THETA,
            scaling={} if local else scaling,  # transformers applies it to the global layers only
        )
    return found


def layer(config: Sizes, index: int) -> LayerSpec:
    """What decoder layer `index` of a Gemma 3 computes."""
    scale = config.query_pre_attn_scalar**-0.5
    return decoder_layer(
        config, index, branches=BRANCHES, norms=FOUR_NORMS, attention_scale=scale, head_norms=HEAD_NORMS
    )


def gguf_config(meta: Metadata) -> dict[str, Any]:
    """Keys of config.json from a GGUF file's metadata."""
    pattern = meta("attention.sliding_window_pattern")
    found = {
        "sliding_window": meta("attention.sliding_window") or None,
        "query_pre_attn_scalar": attention_scalar_of_gguf(meta, SHAPE_27B),
        "rope_theta": meta("rope.freq_base") or GLOBAL_THETA,
        "rope_local_base_freq": meta("rope.freq_base_swa") or LOCAL_THETA,
        "sliding_window_pattern": pattern if type(pattern) is int else PATTERN,
    }
    if meta("rope.scaling.type") not in (None, "none"):
        found["rope_scaling"] = {"rope_type": meta("rope.scaling.type"), "factor": meta("rope.scaling.factor")}
    return found


GEMMA3 = Architecture(
    name="Gemma 3",
    model_type="gemma3_text",
    transformers_type="gemma3_text",
    causal_class="Gemma3ForCausalLM",
    vllm=True,
    openvino=True,
    tvm=True,
    genai_type="gemma3_text",
    activation_key=ACTIVATION_KEY,
    patched=Patched(
        configuration="configuration_gemma3_vacc",
        config_class="Gemma3TextConfig",
        modeling="modeling_gemma3_vacc",
        stack="Gemma3TextModel",
        causal="Gemma3ForCausalLM",
        classifier="Gemma3TextForSequenceClassification",
    ),
    gguf=Gguf(
        "gemma3",
        {**GGUF_BLOCKS, **GGUF_FOUR_NORMS, **GGUF_HEAD_NORMS},
        gguf_config,
        written=True,
        with_head=True,
    ),
    read=read,
    layer=layer,
    branches=BRANCHES,
    multimodal=("gemma3",),
    text_defaults=TEXT_DEFAULTS,
)
