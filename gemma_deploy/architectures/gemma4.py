"""Gemma 4, text: norms that multiply by their weight, unscaled scores, wider heads in global layers, a number a layer.

12B (`gemma4_unified_text`) and 31B; E2B and E4B, whose layers add a vector for each token, and whose last layers share
the keys and values of earlier ones; 26B-A4B, whose layers have experts beside the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gemma_deploy.architectures.base import (
    FULL,
    SLIDING,
    Architecture,
    Facts,
    LayerSpec,
    LayerType,
    Patched,
    Rope,
    Sizes,
    part_keys,
)
from gemma_deploy.architectures.blocks import Experts, PerLayerTable
from gemma_deploy.architectures.gemma4_gguf import GEMMA4_GGUF
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
    rope,
    without_values,
)
from gemma_deploy.architectures.sharing import SHARED_LAYERS, check_sharing, sharing, with_vectors, with_width

ACTIVATION_KEY = "hidden_activation"
PATTERN, GLOBAL_HEAD_DIM, WINDOW = 6, 512, 512
PER_LAYER_SIZE = 256  # of transformers' Gemma4TextConfig
PER_LAYER = "per_layer_config"
EXPERT_KEYS = ("num_experts", "top_k_experts", "moe_intermediate_size")  # none has a default
SIZES = ("head_dim", "num_key_value_heads")  # what of a layer that key may change
LAYER_NUMBER = re.compile(r"[0-9]{1,4}")
DEFAULT_ROPE: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
BRANCHES = (
    attention(post_norm="post_attention_layernorm", head_norms=HEAD_NORMS, value_norm=VALUE_NORM),
    gated_mlp(norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
)
KEY_IS_VALUE = (without_values(BRANCHES[0]), BRANCHES[1])
K_AND_V = (("key", "self_attn.k_proj"), ("value", "self_attn.k_proj"))
# Of transformers' Gemma4TextConfig: what the text_config of a published model may leave out.
TEXT_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": WINDOW,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    ACTIVATION_KEY: "gelu_pytorch_tanh",
}
UNIFIED_DEFAULTS = {**TEXT_DEFAULTS, "sliding_window": 1024, "max_position_embeddings": 262144}


def read(keys: ConfigKeys, size: Mapping[str, int], layers: int) -> Facts:
    """What config.json says about a Gemma 4, defaults filled in."""
    layer_types = full_at_last(keys, layers)
    keys.boolean("use_double_wide_mlp", False)
    check_sharing(keys, layer_types, default=0)
    keys.boolean("attention_k_eq_v", False)
    if keys.raw.get(PER_LAYER) is None:
        keys.integer("global_head_dim", default=GLOBAL_HEAD_DIM)
        if keys.raw.get("num_global_key_value_heads") is not None:
            keys.integer("num_global_key_value_heads")
    else:
        check_per_layer(keys, layers)
    if not keys.problems:
        of_most = size["num_key_value_heads"], size["head_dim"]
        sizes = [_sizes(keys.raw, kind, index, of_most) for index, kind in enumerate(layer_types)]
        check_sizes(keys, sizes, layer_types, heads=size["num_attention_heads"])
    return Facts(
        layer_types=layer_types,
        sliding_window=keys.integer("sliding_window", default=WINDOW) if SLIDING in layer_types else None,
        rope=ropes(keys, layer_types, DEFAULT_ROPE),
        query_pre_attn_scalar=1.0,  # scores are not scaled: the norms of queries and keys carry it
        max_position_embeddings=keys.integer("max_position_embeddings", default=131072),
        hidden_activation=activation(keys, ACTIVATION_KEY),
        final_logit_softcapping=keys.cap("final_logit_softcapping", None),
    )


def read_text(keys: ConfigKeys, size: Mapping[str, int], layers: int) -> Facts:
    """`read` of `gemma4_text`, whose config class has per-layer embeddings by default, and may have experts."""
    _check_experts(keys)
    if keys.raw.get("hidden_size_per_layer_input", PER_LAYER_SIZE):
        keys.integer("hidden_size_per_layer_input", default=PER_LAYER_SIZE, most=1 << 16)
        rows = keys.integer("vocab_size_per_layer_input", default=262144)
        if rows != size["vocab_size"]:
            keys.problem("vocab_size_per_layer_input", rows, f"{size['vocab_size']}, as many as vocab_size")
    return read(keys, size, layers)


def per_layer(config: Sizes) -> PerLayerTable | None:
    """The table of vectors that layers add; None where the model has none."""
    size = config.raw.get("hidden_size_per_layer_input", PER_LAYER_SIZE)
    if not size:
        return None
    return PerLayerTable(config.raw.get("vocab_size_per_layer_input", 262144), len(config.layer_types), size)


def with_keys(config: Sizes, index: int) -> LayerSpec:
    """Layer `index`, were it one with keys and values of its own."""
    shared = bool(config.raw.get("attention_k_eq_v")) and config.layer_types[index] == FULL
    spec = decoder_layer(
        config,
        index,
        branches=KEY_IS_VALUE if shared else BRANCHES,
        norms=FOUR_NORMS,
        attention_scale=1.0,
        head_norms=HEAD_NORMS,
        sizes=_sizes(config.raw, config.layer_types[index], index, (config.num_key_value_heads, config.head_dim)),
    )
    spec = replace(spec, value_norm=VALUE_NORM, scalar="layer_scalar")
    if shared:
        linears = tuple(one for one in spec.linears if one.name != "self_attn.v_proj")
        spec = replace(spec, linears=linears, caches=K_AND_V)
    return spec


def layer(config: Sizes, index: int) -> LayerSpec:
    """What decoder layer `index` of a Gemma 4 computes."""
    spec = sharing(with_keys(config, index), config.layer_types, config.raw.get(SHARED_LAYERS, 0))
    wide = spec.cache_from is not None and config.raw.get("use_double_wide_mlp")
    return with_width(spec, 2 * spec.intermediate_size) if wide else spec


def layer_of_text(config: Sizes, index: int) -> LayerSpec:
    """`layer` of `gemma4_text`, which may have experts or per-layer embeddings."""
    spec = layer(config, index)
    if not config.raw.get("enable_moe_block"):
        return with_vectors(spec, per_layer(config))
    experts = Experts(*(config.raw[key] for key in EXPERT_KEYS))
    return replace(spec, norms=(*spec.norms, *experts.norms), experts=experts)


def _check_experts(keys: ConfigKeys) -> None:
    """How many experts there are, how many of them a token runs through, and that nothing else is beside them."""
    if not keys.boolean("enable_moe_block", False):
        return
    count, chosen, _ = (keys.integer(key, most=1 << 16) for key in EXPERT_KEYS)
    if chosen > count:
        keys.problem("top_k_experts", chosen, f"{count} at most, as many as num_experts")
    for key, default in (("hidden_size_per_layer_input", PER_LAYER_SIZE), ("num_kv_shared_layers", 0)):
        if keys.raw.get(key, default):
            keys.problem(key, keys.raw.get(key, default), "0: no Gemma has it together with enable_moe_block")


def keys_of_part(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    """Keys of config.json by which the patched classes have these layers, and no others."""
    sizes = {
        number: {"head_dim": layer.head_dim, "num_key_value_heads": layer.kv_heads}
        for number, layer in enumerate(layers)
    }
    shared = sum(layer.cache_from is not None for layer in layers)
    found = {**part_keys(layers), PER_LAYER: sizes, "is_part": True, SHARED_LAYERS: shared}
    if all(len({maker for _, maker in layer.caches}) != 1 for layer in layers):
        found["attention_k_eq_v"] = False  # the stock class makes the last layer a global one
    return found


def full_at_last(keys: ConfigKeys, layers: int, pattern: int = PATTERN) -> tuple[LayerType, ...]:
    """`layer_types`, or every `pattern`-th layer full; the last one's is what transformers makes of it."""
    layer_types = given_layer_types(keys, layers) or by_pattern(layers, pattern)
    if layer_types[-1] != FULL:
        keys.warn(f"the last layer is one of {FULL}, whatever layer_types says, as in transformers")
    return (*layer_types[:-1], FULL)


def _sizes(raw: Mapping[str, Any], kind: LayerType, index: int, of_most: tuple[int, int]) -> tuple[int, int]:
    """KV heads and head_dim of a layer.

    Args:
        of_most: those that the config has for all.
    """
    if raw.get(PER_LAYER) is not None:
        return given_sizes(raw, index, of_most)
    if kind != FULL:
        return of_most
    fewer = raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v") else None
    return of_most[0] if fewer is None else fewer, raw.get("global_head_dim", GLOBAL_HEAD_DIM)


def given_sizes(raw: Mapping[str, Any], index: int, of_most: tuple[int, int]) -> tuple[int, int]:
    """KV heads and head_dim of a layer by `per_layer_config`."""
    own: Mapping[str, int] = next((one for number, one in raw[PER_LAYER].items() if int(number) == index), {})
    return own.get("num_key_value_heads", of_most[0]), own.get("head_dim", of_most[1])


def check_per_layer(keys: ConfigKeys, layers: int) -> None:
    """What may be wrong with `per_layer_config` by itself. transformers writes numbers of one width: 05, 11."""
    seen: set[int] = set()
    for number, own in keys.mapping(PER_LAYER).items():
        where, plain = f"{PER_LAYER}.{number}", LAYER_NUMBER.fullmatch(str(number))
        if plain is None or int(plain[0]) >= layers:
            keys.problem(where[:80], number, f"the number of a layer, 0 to {layers - 1}")
            continue
        if int(plain[0]) in seen:
            keys.problem(where, number, f"each layer once, and {int(plain[0])} is there already")
        seen.add(int(plain[0]))
        if not isinstance(own, dict):
            keys.problem(where, own, "an object")
            continue
        for key, value in own.items():
            if key not in SIZES:
                keys.problem(f"{where}.{key}", value, f"{' and '.join(SIZES)} alone: nothing else is built")
            elif type(value) is not int or not 0 < value <= 2**31:
                keys.problem(f"{where}.{key}", value, "a whole number from 1 on")


def check_sizes(
    keys: ConfigKeys, sizes: Sequence[tuple[int, int]], layer_types: Sequence[LayerType], *, heads: int
) -> None:
    """That heads can be shared out in every layer, and that layers of one kind are alike, as their rotary table is.

    Args:
        sizes: KV heads and head_dim of each layer; heads: of queries.
    """
    first: dict[LayerType, tuple[int, int]] = {}
    for index, (kind, own) in enumerate(zip(layer_types, sizes, strict=True)):
        kv_heads, head_dim = own
        if first.setdefault(kind, own) != own:
            keys.problems.append(
                f"{PER_LAYER}: layer {index} ({kind}) has {kv_heads} key/value heads of {head_dim}, and the first of "
                f"its kind {first[kind][0]} of {first[kind][1]}: expected one size for each kind of layer"
            )
        elif heads % kv_heads or head_dim % 2:
            keys.problems.append(
                f"layer {index} ({kind}) has {kv_heads} key/value heads of {head_dim}: expected a divisor of "
                f"num_attention_heads {heads}, and an even head_dim"
            )


def ropes(
    keys: ConfigKeys, layer_types: Sequence[LayerType], default: Mapping[str, Mapping[str, Any]]
) -> dict[LayerType, Rope]:
    """Rotary settings of each kind of layer.

    Args:
        default: where config.json says nothing.
    """
    parameters, found = keys.mapping("rope_parameters") or default, {}
    for kind in (kind for kind in (FULL, SLIDING) if kind in layer_types):
        entry, where = parameters.get(kind), f"rope_parameters.{kind}"
        if not isinstance(entry, Mapping):
            keys.problem(where, entry, "an object with rope_type and rope_theta")
            entry = {}
        found[kind] = rope(keys, dict(entry), where, legacy="rope_theta", default=1e4, scaling={})
    return found


GEMMA4 = Architecture(
    name="Gemma 4",
    model_type="gemma4_text",
    transformers_type="gemma4_text",
    causal_class="Gemma4ForCausalLM",
    genai_type="gemma4_text",
    activation_key=ACTIVATION_KEY,
    patched=Patched(
        configuration="configuration_gemma4_vacc",
        config_class="Gemma4TextConfig",
        modeling="modeling_gemma4_vacc",
        stack="Gemma4TextModel",
        causal="Gemma4ForCausalLM",
        classifier=None,
    ),
    gguf=GEMMA4_GGUF,
    read=read_text,
    layer=layer_of_text,
    branches=BRANCHES,
    multimodal=("gemma4",),
    text_defaults=TEXT_DEFAULTS,
    norm_offset=0.0,
    per_layer=per_layer,
    part_keys=keys_of_part,
    positions_first=True,
    causal_text=("vision",),
)
GEMMA4_UNIFIED = replace(
    GEMMA4,
    name="Gemma 4 12B",
    model_type="gemma4_unified_text",
    transformers_type="gemma4_unified_text",
    causal_class="Gemma4UnifiedForCausalLM",
    patched=replace(
        GEMMA4.patched,
        config_class="Gemma4UnifiedTextConfig",
        stack="Gemma4UnifiedTextModel",
        causal="Gemma4UnifiedForCausalLM",
    ),
    gguf=None,  # llama.cpp has one name for all sizes
    read=read,
    layer=layer,
    per_layer=lambda config: None,
    multimodal=("gemma4_unified",),
    text_defaults=UNIFIED_DEFAULTS,
)
