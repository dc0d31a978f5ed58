"""How llama.cpp writes Gemma 4 down: metadata by kind of layer, and what only tensors say.

Of heads, `key_length` is the size in global layers and `key_length_swa` in local ones; whether keys are values follows
from `attn_v`, the share of channels that turn from `rope_freqs`. One name stands for all sizes, 12B included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_deploy.architectures import gguf_keys
from gemma_deploy.architectures.base import FULL, LAYER_TYPES, SLIDING, LayerType
from gemma_deploy.architectures.gguf import Gguf, Metadata
from gemma_deploy.architectures.gguf_keys import FREQUENCIES
from gemma_deploy.architectures.shared import GGUF_BLOCKS, GGUF_FOUR_NORMS, GGUF_HEAD_NORMS
from gemma_deploy.names import PER_LAYER_NORM, PER_LAYER_PROJECTION, PER_LAYER_TABLE

TOKENS, TABLE = "token_embd.weight", "per_layer_token_embd.weight"
KV_HEADS, WIDTH = "attention.head_count_kv", "feed_forward_length"
# llama.cpp's names of what layers add of a vector for each token.
PER_LAYER_BLOCKS: Mapping[str, str] = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
# And of experts, whose numbers stand beside the matrices that they belong to.
EXPERTS: Mapping[str, str] = {
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
}
EXPERT_NORMS: Mapping[str, str] = {
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
# Control tokens that llama.cpp's own parsers of replies read as text.
SHOWN = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
PER_LAYER_OUTSIDE: Mapping[str, str] = {
    TABLE: f"{PER_LAYER_TABLE}.weight",
    "per_layer_model_proj.weight": f"{PER_LAYER_PROJECTION}.weight",
    "per_layer_proj_norm.weight": f"{PER_LAYER_NORM}.weight",
}


def config(meta: Metadata) -> dict[str, Any]:
    """Keys of config.json from a GGUF file's metadata and tensors."""
    layers = gguf_keys.layer_count(meta)
    if layers is None:
        return {}
    kinds = gguf_keys.layer_types(meta, layers)
    own = layers - gguf_keys.whole_number(meta, "attention.shared_kv_layers", least=0, most=layers - 1, default=0)
    size = gguf_keys.whole_number(meta, "embedding_length_per_layer_input", least=0, most=1 << 16, default=0)
    found: dict[str, Any] = {
        "layer_types": list(kinds),
        "num_kv_shared_layers": layers - own,
        "hidden_size_per_layer_input": size,
        "final_logit_softcapping": meta("final_logit_softcapping"),
        "attention_k_eq_v": _keys_are_values(meta, kinds[:own]),
        "vocab_size_per_layer_input": meta.rows(TABLE if meta.has(TABLE) else TOKENS),
    }
    if SLIDING in kinds:
        found["sliding_window"] = gguf_keys.whole_number(meta, "attention.sliding_window")
    found |= _experts(meta)
    found |= _heads(meta, kinds, found["attention_k_eq_v"])
    return found | _widths(meta, own, layers) | {"rope_parameters": _ropes(meta, kinds, found["global_head_dim"])}


def _experts(meta: Metadata) -> dict[str, Any]:
    """Of a mixture of experts; llama.cpp counts none where there are none."""
    if not meta("expert_count"):
        return {"enable_moe_block": False}
    names = {"num_experts": "expert_count", "top_k_experts": "expert_used_count",
             "moe_intermediate_size": "expert_feed_forward_length"}  # fmt: skip
    sizes = {key: gguf_keys.whole_number(meta, name, most=1 << 16) for key, name in names.items()}
    return {"enable_moe_block": True, **sizes}


def _keys_are_values(meta: Metadata, kinds: tuple[LayerType, ...]) -> bool:
    """Whether global layers have no v_proj; `kinds` are those of layers with keys of their own."""
    full = [f"blk.{index}.attn_v.weight" for index, kind in enumerate(kinds) if kind == FULL]
    missing = [name for name in full if not meta.has(name)]
    if missing and missing != full:
        meta.problem(missing[0], None, "one in every layer that sees everything, or in none of them")
    return bool(missing)


def _heads(meta: Metadata, kinds: tuple[LayerType, ...], keys_are_values: bool) -> dict[str, int]:
    """Sizes and numbers of heads in both kinds of layers."""
    sizes = {FULL: _head_dim(meta, "")} | ({SLIDING: _head_dim(meta, "_swa")} if SLIDING in kinds else {})
    found = {"global_head_dim": sizes[FULL], "head_dim": sizes.get(SLIDING, sizes[FULL])}
    counts = gguf_keys.by_layer(meta, KV_HEADS, len(kinds))
    if counts is None:
        return found
    of_kind = {kind: [count for count, own in zip(counts, kinds, strict=True) if own == kind] for kind in LAYER_TYPES}
    full = gguf_keys.the_same(meta, KV_HEADS, of_kind[FULL], where=FULL)
    local = gguf_keys.the_same(meta, KV_HEADS, of_kind[SLIDING], where=SLIDING)
    if full != local and None not in (full, local) and not keys_are_values:
        expected = "one number for all layers, because those that see everything have attn_v"
        meta.problem(KV_HEADS, [local, full], expected)
    most = full if local is None else local
    return found | {
        key: value
        for key, value in (("num_key_value_heads", most), ("num_global_key_value_heads", full))
        if value is not None
    }


def _head_dim(meta: Metadata, ending: str) -> int:
    """Of keys and values alike; local layers turn all channels, and so many of the global ones as `rope_freqs` says."""
    size = gguf_keys.whole_number(meta, f"attention.key_length{ending}")
    for key in (f"attention.value_length{ending}", f"rope.dimension_count{ending}"):
        if meta(key) not in (None, size):
            meta.problem(key, meta(key), f"{size}, as attention.key_length{ending} says")
    return size


def _widths(meta: Metadata, own: int, layers: int) -> dict[str, Any]:
    """The MLP's width; layers that share keys and values may have twice that."""
    widths = gguf_keys.by_layer(meta, WIDTH, layers)
    if widths is None:
        return {}
    width = gguf_keys.the_same(meta, WIDTH, widths[:own], where="with keys and values of their own")
    last = gguf_keys.the_same(meta, WIDTH, widths[own:], where="that share keys and values")
    if width is not None and last not in (None, width, 2 * width):
        meta.problem(WIDTH, last, f"{width} or {2 * width} in layers that share keys and values")
    found = {} if width is None else {"intermediate_size": width}
    return {**found, "use_double_wide_mlp": last is not None and last != width}


def _ropes(meta: Metadata, kinds: tuple[LayerType, ...], head_dim: int) -> dict[LayerType, Any]:
    scaled = meta("rope.scaling.type")
    if scaled not in (None, "none"):
        meta.problem("rope.scaling.type", scaled, "none: no Gemma 4 scales positions")
    full: dict[str, Any] = {"rope_type": "proportional", "rope_theta": gguf_keys.positive(meta, "rope.freq_base")}
    full["partial_rotary_factor"] = gguf_keys.turned_share(meta, FREQUENCIES, head_dim)
    if SLIDING not in kinds:
        return {FULL: full}
    return {
        FULL: full,
        SLIDING: {"rope_type": "default", "rope_theta": gguf_keys.positive(meta, "rope.freq_base_swa")},
    }


def keys(config: Any) -> dict[str, Any]:
    """Metadata of a model: heads and widths by kind of layer or by layer."""
    layers = config.layers
    kinds = {one.kind: one for one in layers}
    full = kinds[FULL]
    heads, widths = [one.kv_heads for one in layers], [one.intermediate_size for one in layers]
    said: dict[str, Any] = {
        "attention.sliding_window_pattern": [one.kind == SLIDING for one in layers],
        "attention.shared_kv_layers": sum(one.cache_from is not None for one in layers),
        "embedding_length_per_layer_input": 0 if full.per_layer is None else full.per_layer.size,
        KV_HEADS: heads if len(set(heads)) > 1 else heads[0],
        WIDTH: widths if len(set(widths)) > 1 else widths[0],
    }
    if full.experts is not None:
        said |= {
            "expert_count": full.experts.count,
            "expert_used_count": full.experts.chosen,
            "expert_feed_forward_length": full.experts.width,
        }
    for kind, ending in ((FULL, ""), (SLIDING, "_swa")):
        if kind in kinds:
            for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
                said[f"{key}{ending}"] = kinds[kind].head_dim
    return said


GEMMA4_GGUF = Gguf(
    "gemma4",
    {**GGUF_BLOCKS, **GGUF_FOUR_NORMS, **GGUF_HEAD_NORMS, **PER_LAYER_BLOCKS, **EXPERT_NORMS},
    config,
    whole={"layer_output_scale.weight": "layer_scalar", **EXPERTS},
    outside=PER_LAYER_OUTSIDE,
    said=(FREQUENCIES,),
    keys=keys,
    tokenizer="gemma4",
    shown=SHOWN,
    written=True,
)
