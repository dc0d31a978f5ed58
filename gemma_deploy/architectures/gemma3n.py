"""Gemma 3n, text: several streams of which a layer computes one (AltUp), LAuReL beside attention, sparse gates.

Norms multiply by their weight and scores are not scaled, as in Gemma 4; every layer adds a vector of each token, and
the last ones share the keys and values of earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gemma_deploy.architectures.base import (
    SLIDING,
    Architecture,
    Facts,
    LayerSpec,
    Linear,
    Patched,
    Sizes,
    part_keys,
)
from gemma_deploy.architectures.blocks import AltUp, Laurel, PerLayerTable
from gemma_deploy.architectures.gemma3 import ropes
from gemma_deploy.architectures.gemma3n_gguf import GEMMA3N_GGUF
from gemma_deploy.architectures.keys import ConfigKeys
from gemma_deploy.architectures.shared import (
    FOUR_NORMS,
    HEAD_NORMS,
    VALUE_NORM,
    activation,
    attention,
    by_pattern,
    decoder_layer,
    gated_mlp,
    given_layer_types,
)
from gemma_deploy.architectures.sharing import SHARED_LAYERS, check_sharing, sharing, with_vectors, with_width

ACTIVATION_KEY = "hidden_activation"
WIDTHS, SPARSITY = "intermediate_size", "activation_sparsity_pattern"
PATTERN, SPARSE_LAYERS, SPARSE_SHARE = 5, 10, 0.95
KEYS, VALUES = ("self_attn.k_proj", "self_attn.k_norm"), ("self_attn.v_proj", VALUE_NORM)
ATTENTION = attention(post_norm="post_attention_layernorm", head_norms=HEAD_NORMS, value_norm=VALUE_NORM)
BRANCHES = (
    replace(ATTENTION, inner=(*HEAD_NORMS[0], *KEYS, *VALUES)),  # each is normed before the next one is made
    gated_mlp(norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
)
# Of transformers' Gemma3nTextConfig: what the text_config of a published model may leave out.
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262400,
    "hidden_size": 2048,
    WIDTHS: 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    ACTIVATION_KEY: "gelu_pytorch_tanh",
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    SHARED_LAYERS: 15,
    "laurel_rank": 64,
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
}


def read(keys: ConfigKeys, size: Mapping[str, int], layers: int) -> Facts:
    """What config.json says about a Gemma 3n, defaults filled in."""
    layer_types = given_layer_types(keys, layers) or by_pattern(layers, PATTERN)
    check_sharing(keys, layer_types, default=TEXT_DEFAULTS[SHARED_LAYERS])
    _check_sparsity(keys, layers)
    for key in ("vocab_size_per_layer_input", "hidden_size_per_layer_input", "laurel_rank"):
        keys.integer(key, default=TEXT_DEFAULTS[key], most=1 << 30)
    _check_streams(keys)
    if size["hidden_size"] % size["num_attention_heads"]:
        keys.problem("hidden_size", size["hidden_size"], "a multiple of num_attention_heads, as transformers asks")
    sliding = keys.integer("sliding_window", default=TEXT_DEFAULTS["sliding_window"])
    return Facts(
        layer_types=layer_types,
        sliding_window=sliding if SLIDING in layer_types else None,
        rope=ropes(keys, layer_types),
        query_pre_attn_scalar=1.0,  # scores are not scaled: the norms of queries and keys carry it
        max_position_embeddings=keys.integer(
            "max_position_embeddings", default=TEXT_DEFAULTS["max_position_embeddings"]
        ),
        hidden_activation=activation(keys, ACTIVATION_KEY),
        final_logit_softcapping=keys.cap("final_logit_softcapping", TEXT_DEFAULTS["final_logit_softcapping"]),
    )


def per_layer(config: Sizes) -> PerLayerTable:
    """The table of vectors that layers add."""
    rows, size = (_said(config, f"{key}_per_layer_input") for key in ("vocab_size", "hidden_size"))
    return PerLayerTable(rows, len(config.layer_types), size)


def layer(config: Sizes, index: int) -> LayerSpec:
    """What decoder layer `index` of a Gemma 3n computes."""
    spec = decoder_layer(config, index, branches=BRANCHES, norms=FOUR_NORMS, attention_scale=1.0, head_norms=HEAD_NORMS)
    widths = config.raw.get(WIDTHS)
    if isinstance(widths, list):
        spec = with_width(spec, widths[index])
    share = sparsity(config.raw, len(config.layer_types))[index]
    parts = [spec.template, str(spec.intermediate_size), *([f"sparse{share:g}"] if share else [])]
    laurel = Laurel(_said(config, "laurel_rank"))
    altup = AltUp(_said(config, "altup_num_inputs"), _said(config, "altup_active_idx"))
    spec = with_vectors(
        replace(spec, value_norm=VALUE_NORM, template=".".join(parts), sparsity=share), per_layer(config)
    )
    low_rank = (
        Linear(laurel.left, laurel.rank, spec.hidden_size),
        Linear(laurel.right, spec.hidden_size, laurel.rank),
    )
    spec = replace(
        spec,
        linears=(*spec.linears, *low_rank),
        norms=(*spec.norms, laurel.norm, altup.norm),
        laurel=laurel,
        altup=altup,
    )
    return sharing(spec, config.layer_types, _said(config, SHARED_LAYERS))


def sparsity(raw: Mapping[str, Any], layers: int) -> tuple[float, ...]:
    """Share of the gates of each layer that are set to zero."""
    given = raw.get(SPARSITY)
    if given is not None:
        return tuple(map(float, given))
    sparse = SPARSE_LAYERS if layers > SPARSE_LAYERS else 0
    return (SPARSE_SHARE,) * sparse + (0.0,) * (layers - sparse)


def keys_of_part(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    """Keys of config.json by which the patched classes have these layers, and no others."""
    return {
        **part_keys(layers),
        WIDTHS: [layer.intermediate_size for layer in layers],
        SPARSITY: [layer.sparsity for layer in layers],
        SHARED_LAYERS: sum(layer.cache_from is not None for layer in layers),
    }


def _said(config: Sizes, key: str) -> Any:
    return config.raw.get(key, TEXT_DEFAULTS[key])


def _check_streams(keys: ConfigKeys) -> None:
    streams = keys.integer("altup_num_inputs", default=TEXT_DEFAULTS["altup_num_inputs"], most=64)
    active = keys.raw.get("altup_active_idx", 0)
    if streams == 1:
        keys.problem("altup_num_inputs", streams, "2 streams or more: no published Gemma 3n has one alone")
    if type(active) is not int or not 0 <= active < streams:
        keys.problem("altup_active_idx", active, f"the number of a stream, 0 to {streams - 1}")
    if not keys.boolean("altup_correct_scale", True):
        keys.problem("altup_correct_scale", False, "true: no published Gemma 3n goes without")


def _check_sparsity(keys: ConfigKeys, layers: int) -> None:
    given = keys.raw.get(SPARSITY)
    if given is None:
        return
    if not isinstance(given, list) or len(given) != layers:
        keys.problem(SPARSITY, given, f"a list of {layers} shares, one for each layer")
        return
    for number, share in enumerate(given):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            keys.problem(f"{SPARSITY}[{number}]", share, "a share from 0 on, below 1")


GEMMA3N = Architecture(
    name="Gemma 3n",
    model_type="gemma3n_text",
    transformers_type="gemma3n_text",
    causal_class="Gemma3nForCausalLM",
    genai_type="gemma4_text",  # the same loop; onnxruntime-genai has no name of its own for it
    activation_key=ACTIVATION_KEY,
    patched=Patched(
        configuration="configuration_gemma3n_vacc",
        config_class="Gemma3nTextConfig",
        modeling="modeling_gemma3n_vacc",
        stack="Gemma3nTextModel",
        causal="Gemma3nForCausalLM",
        classifier=None,
    ),
    gguf=GEMMA3N_GGUF,
    read=read,
    layer=layer,
    branches=BRANCHES,
    multimodal=("gemma3n",),
    text_defaults=TEXT_DEFAULTS,
    norm_offset=0.0,
    per_layer=per_layer,
    listed=(WIDTHS,),
    part_keys=keys_of_part,
    positions_first=True,
)
