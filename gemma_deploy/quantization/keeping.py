"""Which linears read their inputs unrounded: those whose output suffers most, up to a share of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from gemma_deploy.checkpoint import ModelConfig, expected_tensors

KEEP = 0.1  # of all multiplications in linears
# Where keeping one costs a second integer product and no float one: room for every down_proj, a third of the linears at
# most, and the noisiest others.
KEEP_WIDE = 0.34
# What these read is heavy-tailed, and noise averaged over tokens does not say so. Real 270M, 4 windows of WikiText-2,
# 41 linears kept by their noise alone, 11 of 17 down_proj among them: all tokens but one lost KL 0.004, and one became
# another one (KL 6, a lead of 2.05 logits overturned; its massive activations arise in layers 0 and 1). With the 17 and
# nothing else the mean is 0.0026 and the largest 0.3.
HEAVY_TAILED = "mlp.down_proj"
# Square of what rounding adds to a linear's output over the square of that. Below it a linear is not worth keeping: the
# real 270M loses KL 0.0073 with 4 inputs of down_proj kept, 0.0054 with 8, whose noise begins at 3e-4.
LEAST_NOISE = 3e-4


def linears_to_keep(
    records: Sequence[Mapping[str, Any]],
    config: ModelConfig,
    share: float,
    least: float = LEAST_NOISE,
    first: str | None = None,
) -> tuple[str, ...]:
    """Linears by module path, in model order.

    Args:
        records: of the layers, `activation_noise` of every linear in them.
        share: of the multiplications in linears that the kept ones have at most. Linears that read one input are kept
            together, since one rounding serves them all.
        least: noise below which none is kept.
        first: linears of this name within a layer come before all others, by their noise.
    """
    shapes = expected_tensors(config)
    found = []
    for layer, record in zip(config.layers, records, strict=True):
        for group in layer.groups:
            names = [f"{record['layer']}.{reader}" for reader in group.readers]
            noise = max(record["tensors"][reader]["activation_noise"] for reader in group.readers)
            rank = (first in group.readers, noise)
            found.append((rank, sum(prod(shapes[f"{name}.weight"]) for name in names), names))
    left = share * sum(cost for _, cost, _ in found)
    kept: set[str] = set()
    for (_, noise), cost, names in sorted(found, key=lambda each: each[0], reverse=True):
        if cost > left or noise < least:
            break  # a less noisy one that would fit is not what was asked for
        left -= cost
        kept |= set(names)
    return tuple(name for _, _, names in found for name in names if name in kept)
