"""Gemma 2: four norms a layer, sliding and full attention in turns, capped scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_deploy.architectures.base import SLIDING, Architecture, Facts, LayerSpec, Patched, Sizes
from gemma_deploy.architectures.gguf import Gguf, Metadata
from gemma_deploy.architectures.keys import ConfigKeys
from gemma_deploy.architectures.shared import (
    FOUR_NORMS,
    GGUF_BLOCKS,
    GGUF_FOUR_NORMS,
    activation,
    attention,
    attention_scalar,
    attention_scalar_of_gguf,
    by_pattern,
    decoder_layer,
    gated_mlp,
    given_layer_types,
    one_rope,
)

ACTIVATION_KEY = "hidden_activation"
ATTENTION_CAP, LOGIT_CAP, WINDOW = 50.0, 30.0, 4096
SHAPE_27B = (46, 4608)  # layers, hidden size
BRANCHES = (
    attention(post_norm="post_attention_layernorm"),
    gated_mlp(norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
)


def read(keys: ConfigKeys, size: Mapping[str, int], layers: int) -> Facts:
    """What config.json says about a Gemma 2, defaults filled in."""
    layer_types = given_layer_types(keys, layers) or by_pattern(layers, 2)
    scalar = attention_scalar(keys)
    if (size["hidden_size"], size["head_dim"], scalar) == (3584, 256, 224):
        keys.warn(
            "query_pre_attn_scalar is 224; Gemma 2 9B was trained with 256 and early copies of its config were wrong. "
            "224 is used because the file says so; set 256 in config.json"
        )
    return Facts(
        layer_types=layer_types,
        sliding_window=keys.integer("sliding_window", default=WINDOW) if SLIDING in layer_types else None,
        rope=one_rope(keys, layer_types),
        query_pre_attn_scalar=scalar,
        max_position_embeddings=keys.integer("max_position_embeddings", default=8192),
        hidden_activation=activation(keys, ACTIVATION_KEY),
        attn_logit_softcapping=keys.cap("attn_logit_softcapping", ATTENTION_CAP),
        final_logit_softcapping=keys.cap("final_logit_softcapping", LOGIT_CAP),
    )


def layer(config: Sizes, index: int) -> LayerSpec:
    """What decoder layer `index` of a Gemma 2 computes."""
    scale = config.query_pre_attn_scalar**-0.5
    return decoder_layer(config, index, branches=BRANCHES, norms=FOUR_NORMS, attention_scale=scale)


def gguf_config(meta: Metadata) -> dict[str, Any]:
    """Keys of config.json from a GGUF file's metadata."""
    return {
        "sliding_window": meta("attention.sliding_window") or WINDOW,
        "query_pre_attn_scalar": attention_scalar_of_gguf(meta, SHAPE_27B),
        "rope_theta": meta("rope.freq_base") or 10000.0,
        "attn_logit_softcapping": meta("attn_logit_softcapping") or ATTENTION_CAP,
        "final_logit_softcapping": meta("final_logit_softcapping") or LOGIT_CAP,
    }


GEMMA2 = Architecture(
    name="Gemma 2",
    model_type="gemma2",
    transformers_type="gemma2",
    causal_class="Gemma2ForCausalLM",
    vllm=True,
    openvino=True,
    tvm=True,
    genai_type="gemma2",
    activation_key=ACTIVATION_KEY,
    patched=Patched(
        configuration="configuration_gemma2_vacc",
        config_class="Gemma2Config",
        modeling="modeling_gemma2_vacc",
        stack="Gemma2Model",
        causal="Gemma2ForCausalLM",
        classifier="Gemma2ForSequenceClassification",
    ),
    gguf=Gguf("gemma2", {**GGUF_BLOCKS, **GGUF_FOUR_NORMS}, gguf_config, written=True),
    read=read,
    layer=layer,
    branches=BRANCHES,
)
