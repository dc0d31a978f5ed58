"""Reads what a GGUF file says beside its weights, key by key, and tells each that is missing or wrong by its name."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_deploy.architectures.base import FULL, SLIDING, LayerType
from gemma_deploy.architectures.gguf import Metadata

MOST_LAYERS = 1024
# What the frequency of a pair of channels is divided by: one that turns, and one that does not.
TURNED, UNTURNED = 1.0, 1e30
FREQUENCIES = "rope_freqs.weight"  # the tensor that says so
ENOUGH = 1e29  # of which a number counts as the latter


def layer_count(meta: Metadata) -> int | None:
    """`block_count`; None where it is no number of layers, which is told as `num_hidden_layers`."""
    layers = meta("block_count")
    return layers if type(layers) is int and 0 < layers <= MOST_LAYERS else None


def whole_number(meta: Metadata, key: str, *, least: int = 1, most: int = 2**31, default: int | None = None) -> int:
    """The value of a key; without a default it must be there. `least` where it is wrong."""
    value = meta(key)
    if value is None and default is not None:
        return default
    if type(value) is int and least <= value <= most:
        return value
    meta.problem(key, value, f"a whole number from {least} to {most}")
    return least


def positive(meta: Metadata, key: str) -> float:
    """The value of a key that must be there, a number above 0; 1 where it is wrong."""
    value = meta(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < UNTURNED:
        return float(value)
    meta.problem(key, value, "a positive number")
    return 1.0


def layer_types(meta: Metadata, layers: int) -> tuple[LayerType, ...]:
    """The kinds of layers: true, or 1, in the pattern is a sliding one; all full where it is wrong."""
    key = "attention.sliding_window_pattern"
    pattern = meta(key)
    if (
        isinstance(pattern, list)
        and len(pattern) == layers
        and all(type(one) in (bool, int) and one in (0, 1) for one in pattern)
    ):
        return tuple(SLIDING if one else FULL for one in pattern)
    meta.problem(key, pattern, f"a list of {layers} booleans, true where a layer has a window")
    return (FULL,) * layers


def by_layer(meta: Metadata, key: str, layers: int) -> tuple[int, ...] | None:
    """A size of each layer from a number for all or a list; None where it is neither, which is told."""
    value = meta(key)
    values = [value] * layers if type(value) is int else value
    if isinstance(values, list) and len(values) == layers and all(type(one) is int and one > 0 for one in values):
        return tuple(values)
    meta.problem(key, value, f"a whole number from 1 on, or a list of one for each of {layers} layers")
    return None


def the_same(meta: Metadata, key: str, sizes: Sequence[int], *, where: str) -> int | None:
    """The size that all of them are; None where there are none, or where they differ, which is told."""
    found = sorted(set(sizes))
    if len(found) > 1:
        meta.problem(key, found, f"one size in all layers {where}")
    return found[0] if len(found) == 1 else None


def turned_share(meta: Metadata, tensor: str, head_dim: int) -> float:
    """The share of channel pairs that turn, the first ones, from what their frequencies are divided by.

    llama.cpp stores 1 for a pair that turns and 1e30 for one that does not. 1 where the tensor says anything else.
    """
    found = meta.numbers(tensor)
    turned = 0 if found is None else sum(one == TURNED for one in found)
    wanted = [True] * turned + [False] * (head_dim // 2 - turned)
    if found is None or [one == TURNED for one in found] != wanted or any(one < ENOUGH for one in found[turned:]):
        said = None if found is None else f"{len(found)} numbers from {min(found):g} to {max(found):g}"
        pairs = f"{TURNED:g} for each pair of channels that turns and {UNTURNED:g} behind them for those that do not"
        meta.problem(tensor, said, f"{head_dim // 2} numbers, {pairs}")
        return 1.0
    share = 2 * turned / head_dim
    return share if int(share * head_dim // 2) == turned else (2 * turned + 1) / head_dim
