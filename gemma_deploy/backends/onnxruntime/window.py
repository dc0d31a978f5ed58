"""`backend.compile.cache: window`: layers with a sliding window keep the keys and values of that window alone.

GroupQueryAttention with sliding_window_cache=1 (ONNX Runtime 1.32) has buffers of C >= W positions for them, W the
window, and moves what is left to their beginning when they are full: after T tokens the newest L(T) are there,

    G = C - W + 1;  L(T) = T where T <= C, else T - G * ceil((T - C) / G)

(the operator's documentation, "Windowed KV Cache"). A buffer has to be there from the first call, and has at least W
positions: one that grows from nothing, or a shorter one, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.checkpoint.config import ModelConfig

if TYPE_CHECKING:
    import onnx_ir as ir

WINDOW = "window"  # backend.compile.cache
WINDOW_CACHE = "window_cache"  # the free dimension of such a cache, which is as long before a step as after it
CACHES = "past_key_values."  # begins the names of what holds them
SLACK = 64  # positions behind the window in buffers of our own; a step may look ahead within them


def windowed_layers(config: ModelConfig) -> tuple[int, ...]:
    """Layers that have such a cache; those that share keys and values have none at all."""
    return tuple(layer.index for layer in config.layers if layer.window is not None and layer.cache_from is None)


def window_problems(config: ModelConfig, context_length: int) -> list[str]:
    """Why a model or a context has no use for one, as sentences about the recipe's key."""
    layers, where = windowed_layers(config), "backend.compile.cache"
    if not layers or config.sliding_window is None:
        return [f"{where}: window is for layers with a sliding window, and this model has none: write full"]
    if context_length < config.sliding_window:
        return [
            f"{where}: window holds {config.sliding_window} positions, more than the context length {context_length} "
            f"(frontend.shape.input_ids): write full, or a context of {config.sliding_window} and more"
        ]
    return []


def windows_of(nodes: Iterable[ir.Node]) -> dict[str, int]:
    """Caches of a graph that hold a window alone, by the names of its inputs, and how long it is."""
    found = {}
    for node in nodes:
        if node.op_type == "GroupQueryAttention" and "sliding_window_cache" in node.attributes:
            for value in node.inputs[3:5]:
                if value is not None and value.name:
                    found[value.name] = node.attributes["local_window_size"].as_int()
    return found


def capacity_of(window: int) -> int:
    """Positions in a buffer of our own."""
    return window + SLACK


def empty_caches(session: Any, windows: Mapping[str, int], room: int = 0) -> dict[str, np.ndarray]:
    """What a session's caches are before the first token, by input: room for a window where they hold that alone.

    Args:
        windows: as `windows_of` gives them; room: positions of all others.
    """
    return {
        value.name: np.zeros(
            (1, value.shape[1], capacity_of(windows[value.name]) if value.name in windows else room, value.shape[3]),
            np.int8 if value.type == "tensor(int8)" else np.float32,
        )
        for value in session.get_inputs()
        if value.name.startswith(CACHES)
    }


def resident(tokens: int, window: int, capacity: int) -> int:
    """Positions in a buffer after so many tokens: L(T)."""
    if tokens <= capacity:
        return tokens
    step = capacity - window + 1
    return tokens - step * -(-(tokens - capacity) // step)


def most_ahead(length: int, window: int, capacity: int, *, wanted: int) -> int:
    """Of `wanted` tokens to come, as many as can be taken back again, one at least.

    Positions move when a buffer is full, and the length before that is gone then: a step that moves them has one token,
    which is not taken back.
    """
    here, count = resident(length, window, capacity), 0
    while count < wanted and resident(length + count + 1, window, capacity) == here + count + 1:
        count += 1
    return max(count, 1)
