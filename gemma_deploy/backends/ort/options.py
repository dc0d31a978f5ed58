"""Which kernels the graph uses: data, from the recipe and from what calibration kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

MODEL = "model"
GRAPH = f"{MODEL}.onnx"
# Tokens from which on a prompt goes through integer products: below it the block kernel reads the weights once anyway.
INTEGER_FROM = 16


@dataclass(frozen=True)
class Kernels:
    """How the linears of an int8 graph are computed.

    Args:
        block: input channels that share a scale of the activations in MatMulNBits, where the weights have one scale per
            row; grouped weights have their groups.
        integer: prompts go through MatMulInteger with a scale per token. Such a graph has a branch for each.
        wide: linears (module paths) whose activations are rounded to 16 bits there, in two integer products.
    """

    block: int = 128
    integer: bool = False
    wide: Collection[str] = field(default_factory=frozenset)
