"""What layers of some generations have beside attention and MLP: vectors of each token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PerLayer:
    """What a layer adds of a vector that each token has for it: x + norm(projection(act(gate(x)) * vector)).

    Args:
        size: of the vector; gate, projection: linears; norm: before the sum.
    """

    size: int
    gate: str = "per_layer_input_gate"
    projection: str = "per_layer_projection"
    norm: str = "post_per_layer_input_norm"


@dataclass(frozen=True)
class PerLayerTable:
    """The table of such vectors: [rows, layers * size], beside it a projection of the embeddings of the same width."""

    rows: int
    layers: int
    size: int

    @property
    def width(self) -> int:
        """Columns: the vectors of all layers."""
        return self.layers * self.size
