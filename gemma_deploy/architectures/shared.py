"""What several generations have in common: keys of config.json, and the decoder layer with grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma_deploy.architectures.base import (
    EXACT_GELU,
    LAYER_TYPES,
    TANH_GELU,
    Activation,
    Branch,
    InputGroup,
    LayerSpec,
    LayerType,
    Linear,
    Rope,
    Sizes,
)
from gemma_deploy.architectures.gguf import Metadata
from gemma_deploy.architectures.keys import ConfigKeys

GELU_NAMES = (EXACT_GELU, TANH_GELU, "gelu_new")

QKV = InputGroup(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm", fused="self_attn.qkv_proj"
)
ATTENDED = InputGroup(("self_attn.o_proj",), maker="self_attn.v_proj")
PRODUCT = InputGroup(("mlp.down_proj",), maker="mlp.up_proj")
CACHES = (("key", "self_attn.k_proj"), ("value", "self_attn.v_proj"))
HEAD_NORMS = (("self_attn.q_proj", "self_attn.q_norm"), ("self_attn.k_proj", "self_attn.k_norm"))
# llama.cpp's names of what all generations have.
GGUF_BLOCKS: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp says ffn_norm for the norm before the MLP, which Hugging Face names differently with two and four norms.
GGUF_FOUR_NORMS: Mapping[str, str] = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GGUF_HEAD_NORMS: Mapping[str, str] = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FOUR_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
VALUE_NORM = "self_attn.v_norm"  # of Gemma 3n and 4; it has no weight


def gate_up(norm: str) -> InputGroup:
    """What the MLP reads, behind its norm."""
    return InputGroup(("mlp.gate_proj", "mlp.up_proj"), norm=norm, fused="mlp.gate_up_proj")


def attention(
    post_norm: str | None, head_norms: tuple[tuple[str, str], ...] = (), *, value_norm: str | None = None
) -> Branch:
    """Grouped-query attention.

    Args:
        value_norm: of each head of values; no factor of v_proj's rows passes it. Queries are normed first then.
    """
    inner: tuple[str, ...] = (*QKV.readers, *(norm for _, norm in head_norms))
    between, attended = "rotary embedding, mask, softmax or cache", ATTENDED
    if value_norm:
        (query, query_norm), (_, key_norm) = head_norms
        inner = (query, query_norm, *QKV.readers[1:], key_norm, value_norm)
        attended = replace(ATTENDED, maker=None)
    return Branch("self_attn", "input_layernorm", QKV, attended, post_norm, inner, attends=True, between=between)


def without_values(branch: Branch) -> Branch:
    """The same attention where keys are values: there is no v_proj."""
    readers = branch.entry.readers[:2]
    inner = tuple(name for name in branch.inner if name != branch.entry.readers[2])
    return replace(branch, entry=replace(branch.entry, readers=readers, fused="self_attn.qk_proj"), inner=inner)


def gated_mlp(norm: str, post_norm: str | None) -> Branch:
    """down(act(gate(x)) * up(x))."""
    inner = ("mlp.gate_proj", "mlp.act_fn", "mlp.up_proj")
    return Branch("mlp", norm, gate_up(norm), PRODUCT, post_norm, inner, between="product of activation and up_proj")


def decoder_layer(
    config: Sizes,
    index: int,
    *,
    branches: tuple[Branch, ...],
    norms: tuple[str, ...],
    attention_scale: float,
    head_norms: tuple[tuple[str, str], ...] = (),
    sizes: tuple[int, int] | None = None,
) -> LayerSpec:
    """A layer of the sizes that the config has for all of them.

    Args:
        sizes: KV heads and head_dim of this one, where layers differ in them.
    """
    kind, hidden, inner = config.layer_types[index], config.hidden_size, config.intermediate_size
    kv_heads, head_dim = sizes or (config.num_key_value_heads, config.head_dim)
    queries, keys = config.num_attention_heads * head_dim, kv_heads * head_dim
    return LayerSpec(
        index=index,
        kind=kind,
        template=kind,
        hidden_size=hidden,
        heads=config.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        window=config.sliding_window if kind == "sliding_attention" else None,
        rope=config.rope[kind],
        attention_scale=attention_scale,
        linears=(
            Linear("self_attn.q_proj", queries, hidden),
            Linear("self_attn.k_proj", keys, hidden),
            Linear("self_attn.v_proj", keys, hidden),
            Linear("self_attn.o_proj", hidden, queries),
            Linear("mlp.gate_proj", inner, hidden),
            Linear("mlp.up_proj", inner, hidden),
            Linear("mlp.down_proj", hidden, inner),
        ),
        branches=branches,
        head_norms=head_norms,
        caches=CACHES,
        norms=norms,
    )


def given_layer_types(keys: ConfigKeys, layers: int) -> tuple[LayerType, ...] | None:
    """`layer_types` where the file has a right one."""
    given = keys.raw.get("layer_types")
    if given is None:
        return None
    if not isinstance(given, list) or any(one not in LAYER_TYPES for one in given):
        keys.problem("layer_types", given, "a list of " + " / ".join(LAYER_TYPES))
    elif len(given) != layers:
        keys.problem("layer_types", f"{len(given)} entries", f"{layers}, one per layer")
    else:
        return tuple(given)
    return None


def by_pattern(layers: int, pattern: int) -> tuple[LayerType, ...]:
    """Every `pattern`-th layer sees everything."""
    return tuple("sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers))


def activation(keys: ConfigKeys, key: str) -> Activation:
    """The form of GELU."""
    value = keys.raw.get(key, TANH_GELU)
    if value not in GELU_NAMES:
        keys.problem(key, value, TANH_GELU)
    return EXACT_GELU if value == EXACT_GELU else TANH_GELU


def attention_scalar(keys: ConfigKeys) -> float:
    """`query_pre_attn_scalar`, with a warning where it is missing."""
    if "query_pre_attn_scalar" not in keys.raw:
        keys.warn(
            "no query_pre_attn_scalar; 256 is used, which is transformers' default, "
            "but Gemma 2 27B needs 144 and Gemma 3 27B 168"
        )
    return keys.number("query_pre_attn_scalar", default=256.0)


def rope(
    keys: ConfigKeys, entry: object, where: str, *, legacy: str, default: float, scaling: Mapping[str, Any]
) -> Rope:
    """One rotary embedding, in either spelling.

    Args:
        entry: of `rope_parameters`, None where there is none; where: its name.
        legacy: the older key of theta; default: theta without both.
        scaling: the older `rope_scaling`, where it applies.
    """
    if entry is not None and not isinstance(entry, dict):
        keys.problem(where, entry, "an object")
    found = {**(entry if isinstance(entry, dict) else {}), **scaling}
    theta = found.get("rope_theta")
    theta = keys.number(legacy, default=default) if theta is None else keys.positive(where, theta)
    named = found.get("rope_type") or found.get("type")
    if named is None and (scaling or "factor" in found):
        keys.problem("rope_scaling rope_type" if scaling else f"{where} rope_type", None, "linear, beside its factor")
    kind, factor, rotated = named or "default", 1.0, 1.0
    if kind == "linear":
        factor = keys.positive(f"{where} factor", found.get("factor"))
    elif kind == "proportional":
        factor = keys.positive(f"{where} factor", found.get("factor", 1.0))
        rotated = keys.positive(f"{where} partial_rotary_factor", found.get("partial_rotary_factor", 1.0))
        if rotated > 1:
            keys.problem(f"{where} partial_rotary_factor", rotated, "a share, 1 at most")
    elif kind != "default":
        keys.problem(f"{where} rope_type", kind, "default, linear or proportional: no Gemma uses another")
    return Rope(theta, factor, rotated)


def one_rope(keys: ConfigKeys, layer_types: tuple[LayerType, ...]) -> dict[LayerType, Rope]:
    """The same base for all kinds, as Gemma 1 and 2 have it; an entry for each kind is read as well."""
    parameters, scaling = keys.mapping("rope_parameters"), keys.mapping("rope_scaling")
    each = any(name in parameters for name in LAYER_TYPES)
    return {
        kind: rope(
            keys,
            parameters.get(kind) if each else parameters,
            f"rope_parameters.{kind}" if each else "rope_parameters",
            legacy="rope_theta",
            default=1e4,
            scaling=scaling,
        )
        for kind in LAYER_TYPES
        if kind in layer_types
    }


def attention_scalar_of_gguf(meta: Metadata, exception: tuple[int, int]) -> int:
    """Not in the metadata. Only the 27B models differ from head_dim: hidden / heads (144 and 168).

    A whole number: transformers' config classes refuse 256.0 for it.

    Args:
        exception: layers and hidden size of the 27B model.
    """
    heads, head_dim = meta("attention.head_count"), meta("attention.key_length")
    if (meta("block_count"), meta("embedding_length")) == exception and type(heads) is int and heads > 0:
        return int(meta("embedding_length") // heads)
    return head_dim if type(head_dim) is int and head_dim else 256
