"""Which linears read their inputs unrounded: those whose output suffers most, up to a share of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from gemma_deploy.checkpoint import ModelConfig, expected_tensors
from gemma_deploy.quantization.budget import Budget


def unrounded_inputs(
    records: Sequence[Mapping[str, Any]],
    config: ModelConfig,
    budget: Budget,
) -> tuple[str, ...]:
    """Linears by module path, in model order.

    Of experts, what reads the stream of tokens is one linear, of those that a token runs through; what they read last,
    inside, is never rounded and counts for nothing.

    Args:
        records: of the layers, `activation_noise` of every linear in them.
    """
    shapes = expected_tensors(config)
    found, inside = [], set[str]()
    for layer, record in zip(config.layers, records, strict=True):
        for group in layer.groups:
            names = [f"{record['layer']}.{reader}" for reader in group.readers]
            noise = max(record["tensors"][reader]["activation_noise"] for reader in group.readers)
            rank = (budget.first in group.readers, noise)
            found.append((rank, sum(prod(shapes[f"{name}.weight"]) for name in names), names))
        if layer.experts is not None:
            experts, name = layer.experts, f"{record['layer']}.{layer.experts.gate_up}"
            cost = prod(shapes[name]) * experts.chosen // experts.count
            found.append(((False, record["tensors"][experts.gate_up]["activation_noise"]), cost, [name]))
            inside.add(f"{record['layer']}.{experts.down}")
    left = budget.share * sum(cost for _, cost, _ in found)
    kept: set[str] = set()
    for (_, noise), cost, names in sorted(found, key=lambda each: each[0], reverse=True):
        if cost > left or noise < budget.least_noise:
            break  # a less noisy one that would fit is not what was asked for
        left -= cost
        kept |= set(names)
    order = [name for _, _, names in found for name in names if name in kept]
    return (*order, *sorted(inside))
