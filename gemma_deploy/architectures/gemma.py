"""Gemma 1: two norms a layer, full attention, no caps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_deploy.architectures.base import (
    EXACT_GELU,
    FULL,
    SLIDING,
    TANH_GELU,
    Architecture,
    Facts,
    LayerSpec,
    Patched,
    Sizes,
)
from gemma_deploy.architectures.gguf import Gguf, Metadata
from gemma_deploy.architectures.keys import ConfigKeys
from gemma_deploy.architectures.shared import (
    GGUF_BLOCKS,
    activation,
    attention,
    decoder_layer,
    gated_mlp,
    given_layer_types,
    one_rope,
)

ACTIVATION_KEY = "hidden_act"
NORMS = ("input_layernorm", "post_attention_layernorm")
BRANCHES = (attention(post_norm=None), gated_mlp(norm="post_attention_layernorm", post_norm=None))


def read(keys: ConfigKeys, size: Mapping[str, int], layers: int) -> Facts:
    """What config.json says about a Gemma 1, defaults filled in."""
    layer_types = given_layer_types(keys, layers)
    if layer_types and SLIDING in layer_types:
        keys.problem("layer_types", SLIDING, "full_attention only: Gemma 1 has no window")
        layer_types = None
    layer_types = layer_types or (FULL,) * layers
    found = activation(keys, ACTIVATION_KEY)
    return Facts(
        layer_types=layer_types,
        sliding_window=None,
        rope=one_rope(keys, layer_types),
        query_pre_attn_scalar=float(size["head_dim"]),
        max_position_embeddings=keys.integer("max_position_embeddings", default=8192),
        hidden_activation=TANH_GELU if found == EXACT_GELU else found,  # transformers: "gelu" was meant for tanh
        attn_logit_softcapping=keys.cap("attn_logit_softcapping", None),
        final_logit_softcapping=keys.cap("final_logit_softcapping", None),
    )


def layer(config: Sizes, index: int) -> LayerSpec:
    """A layer; all are alike."""
    scale = config.query_pre_attn_scalar**-0.5
    return decoder_layer(config, index, branches=BRANCHES, norms=NORMS, attention_scale=scale)


def gguf_config(meta: Metadata) -> dict[str, Any]:
    """Keys of config.json from a GGUF file's metadata."""
    return {"rope_theta": meta("rope.freq_base") or 10000.0}


GEMMA = Architecture(
    name="Gemma 1",
    model_type="gemma",
    transformers_type="gemma",
    causal_class="GemmaForCausalLM",
    vllm=True,
    openvino=True,
    tvm=True,
    genai_type="gemma",
    activation_key=ACTIVATION_KEY,
    patched=Patched(
        configuration="configuration_gemma_vacc",
        config_class="GemmaConfig",
        modeling="modeling_gemma_vacc",
        stack="GemmaModel",
        causal="GemmaForCausalLM",
        classifier="GemmaForSequenceClassification",
        layer_types=False,
    ),
    gguf=Gguf("gemma", {**GGUF_BLOCKS, "ffn_norm": "post_attention_layernorm"}, gguf_config, written=True),
    read=read,
    layer=layer,
    branches=BRANCHES,
)
