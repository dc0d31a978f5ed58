"""Where activations are observed: the inputs of the linears, the layers' outputs, the LM head's input. Data and names.

A point is named `MODULE.in` or `MODULE.out`, MODULE as in the checkpoint: `model.layers.3.mlp.down_proj.in`.
"""

from __future__ import annotations

from gemma_deploy.architectures import InputGroup, Laurel, LayerSpec, PerLayer, input_groups
from gemma_deploy.names import CACHE_FACTOR, CACHE_SCALE

SHARD_TOKENS = 2048  # windows of about so many tokens pass through a layer together, see shards.py
TOKENS = 1024  # inputs kept as they are, of each group of linears, where activations are rounded
LAYER_OUTPUT = "out"
CACHED = "cache"  # where a layer's keys and values are, normed and turned; nothing is observed there
HEAD_INPUT = "lm_head.in"
# Kind of point -> how tables and pictures call it.
_GROUPS = (*input_groups(), *(InputGroup((name,)) for name in (Laurel(0).right, *PerLayer(0).linears)))
LABELS = {f"{group.observed}.in": group.label for group in _GROUPS} | {
    LAYER_OUTPUT: "layer output",
    HEAD_INPUT: "LM head input",
}


def input_point(linear: str) -> str:
    """The point that holds the input of a linear: `...self_attn.v_proj` -> `...self_attn.q_proj.in`."""
    read_with = InputGroup((input_groups()[0].observed, Laurel(0).left))  # LAuReL reads what attention reads
    for group in (*input_groups(), read_with):
        for reader in group.readers:
            if linear.endswith(f".{reader}"):
                return f"{linear.removesuffix(reader)}{group.observed}.in"
    return f"{linear}.in"


def cache_columns(layer: LayerSpec) -> int:
    """Values of a token in a store of the layer's keys and values."""
    return 2 * layer.kv_heads * layer.head_dim


def cache_factor_names(layer: LayerSpec) -> dict[str, str]:
    """The parameters [Hk * D] by which channels of a layer's "key" and "value" are divided before they become codes.

    None where the layer has no cache of its own.
    """
    makers = dict(layer.caches)
    if makers and makers["key"] == makers["value"]:  # both come from one linear
        makers["value"] = layer.value_norm or f"{makers['value']}.value"
    return {part: f"{layer.prefix}{maker}.{CACHE_FACTOR}" for part, maker in makers.items()}


def cache_scale_names(layer: LayerSpec) -> dict[str, str]:
    """The parameters [Hk * D] with the size of one step of every channel's codes; see `cache_factor_names`."""
    names = cache_factor_names(layer)
    return {part: f"{name.removesuffix(CACHE_FACTOR)}{CACHE_SCALE}" for part, name in names.items()}


def split_point(point: str) -> tuple[int | None, str]:
    """(layer, kind) of a point: `model.layers.3.mlp.down_proj.in` -> (3, "mlp.down_proj.in"); the head has no layer."""
    parts = point.split(".")
    if parts[:2] != ["model", "layers"]:
        return None, point
    return int(parts[2]), ".".join(parts[3:])
