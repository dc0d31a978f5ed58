"""Which kernels the graph uses: data, from the recipe and from what calibration kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

MODEL = "model"
GRAPH = f"{MODEL}.onnx"
LAST, ALL = "last", "all"  # backend.compile.logits
CANDIDATES = 256  # of a screened head, unless its table has fewer rows


@dataclass(frozen=True)
class Kernels:
    """How the linears of an int8 graph are computed.

    Args:
        block: input channels that share a scale of the activations in MatMulNBits, where the weights have one scale per
            row; grouped weights have their groups.
        integer: linears are integer products, with a scale for each token and one for each row of the weights.
        wide: linears (module paths) whose activations are rounded to 14 bits there, in two halves.
        windowed: layers with a sliding window keep the window alone (window.py).
        logits: `last`, of each row's last token, or `all`, of every new token.
        candidates: of a screened head (head.py), tokens whose rows are multiplied whole; 0 for a head of whole rows.
    """

    block: int = 128
    integer: bool = False
    wide: Collection[str] = field(default_factory=frozenset)
    candidates: int = 0
    windowed: bool = False
    logits: str = LAST
