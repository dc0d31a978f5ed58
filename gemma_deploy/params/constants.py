"""Values that come from the config and not from the checkpoint: rotary half tables, and single numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_deploy.architectures import FREQUENCIES, TURNED, UNTURNED
from gemma_deploy.checkpoint import Rope
from gemma_deploy.params.plan import ParamSpec

if TYPE_CHECKING:
    import torch


def constant_rows(spec: ParamSpec, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a constant, float32."""
    import torch

    if spec.value is not None:
        return torch.tensor([spec.value], dtype=torch.float32)
    if spec.name.endswith(".inv_freq"):
        assert spec.rope is not None
        return inverse_frequencies(spec.rope, 2 * spec.plain[0])[start:stop]
    if spec.name == FREQUENCIES:
        assert spec.rope is not None
        return frequency_divisors(spec.rope, 2 * spec.shape[0])[start:stop]
    return rotary_rows(spec, start, stop)


def frequency_divisors(rope: Rope, head_dim: int) -> torch.Tensor:
    """What llama.cpp divides the frequency of each pair of channels by, [head_dim / 2] float32: one that turns, or not.

    Pairs that do not turn lie behind those that do.
    """
    import torch

    divisors = torch.full((head_dim // 2,), UNTURNED, dtype=torch.float32)
    divisors[: int(rope.rotated * head_dim // 2)] = TURNED
    return divisors


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """What a position is multiplied by for the angle of each pair of channels, [head_dim / 2] float32."""
    import torch

    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponent)
    inv_freq[int(rope.rotated * head_dim // 2) :] = 0.0
    if rope.factor != 1.0:
        inv_freq /= rope.factor
    return inv_freq


def rotary_rows(spec: ParamSpec, start: int, stop: int) -> torch.Tensor:
    """Rows (positions) [start, stop) of a cos or sin half table, [stop - start, head_dim / 2] float32.

    The same float32 operations as transformers' rotary embedding, so the values are equal bit for bit.
    """
    import torch

    assert spec.rope is not None
    angles = torch.arange(start, stop, dtype=torch.float32)[:, None] * inverse_frequencies(spec.rope, 2 * spec.shape[1])
    return angles.cos_() if spec.name.endswith(".cos") else angles.sin_()
