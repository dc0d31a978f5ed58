"""Where activations are observed: the inputs of the linears, the layers' outputs, the LM head's input. Data and names.

A point is named `MODULE.in` or `MODULE.out`, MODULE as in the checkpoint: `model.layers.3.mlp.down_proj.in`.
"""

from __future__ import annotations

# Linear whose input is observed -> all linears that read the same tensor.
LAYER_INPUTS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
CACHE_PARTS = {"key": "self_attn.k_proj", "value": "self_attn.v_proj"}  # what a cache holds, and what makes it
CACHE_FACTOR = "cache_factor"
SHARD_TOKENS = 2048  # windows of about so many tokens pass through a layer together, see shards.py
TOKENS = 1024  # inputs kept as they are, of each group of linears, where activations are rounded
LAYER_OUTPUT = "out"
HEAD_INPUT = "lm_head.in"
# Kind of point -> how tables and pictures call it.
LABELS = {
    "self_attn.q_proj.in": "q/k/v input",
    "self_attn.o_proj.in": "o_proj input",
    "mlp.gate_proj.in": "gate/up input",
    "mlp.down_proj.in": "down_proj input",
    "out": "layer output",
    "lm_head.in": "LM head input",
}


def input_point(linear: str) -> str:
    """The point that holds the input of a linear: `...self_attn.v_proj` -> `...self_attn.q_proj.in`."""
    for observed, readers in LAYER_INPUTS.items():
        for reader in readers:
            if linear.endswith(f".{reader}"):
                return f"{linear.removesuffix(reader)}{observed}.in"
    return f"{linear}.in"


def cache_factor(layer: int, part: str) -> str:
    """The parameter [Hk * D] by which channels of a layer's "key" or "value" are divided before they become codes."""
    return f"model.layers.{layer}.{CACHE_PARTS[part]}.{CACHE_FACTOR}"


def split_point(point: str) -> tuple[int | None, str]:
    """(layer, kind) of a point: `model.layers.3.mlp.down_proj.in` -> (3, "mlp.down_proj.in"); the head has no layer."""
    parts = point.split(".")
    if parts[:2] != ["model", "layers"]:
        return None, point
    return int(parts[2]), ".".join(parts[3:])
