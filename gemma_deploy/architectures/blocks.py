"""What layers of some generations have beside attention and MLP: vectors of each token, experts."""

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

    @property
    def linears(self) -> tuple[str, str]:
        """In running order. No factor of columns is folded: into the stream, or past the activation behind the gate."""
        return self.gate, self.projection


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


@dataclass(frozen=True)
class Experts:
    """Small MLPs beside a layer's own, of which every token runs through a few (a mixture of experts).

    The layer adds post_norm of the MLP to the stream r: norm(dense_post_norm(mlp) + post_norm(experts(norm(r)))), where
    norm is the MLP's post_norm. The router reads r itself: router(rms(r) * router_scale / sqrt(hidden)), softmax over
    all experts, the largest `chosen`, divided by their sum, times expert_scale of each.

    Args:
        count: of experts; chosen: that a token runs through; width: inner width of each.
        dense_post_norm: of what the MLP makes; norm: in front of the experts; post_norm: of their sum.
        router: the linear [count, hidden]; router_scale: [hidden]; expert_scale: [count].
        gate_up: the tensor [count, 2 * width, hidden], gates first; down: [count, hidden, width].
    """

    count: int
    chosen: int
    width: int
    dense_post_norm: str = "post_feedforward_layernorm_1"
    norm: str = "pre_feedforward_layernorm_2"
    post_norm: str = "post_feedforward_layernorm_2"
    router: str = "router.proj"
    router_scale: str = "router.scale"
    expert_scale: str = "router.per_expert_scale"
    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"

    @property
    def module(self) -> str:
        """That holds the matrices of all experts."""
        return self.down.rpartition(".")[0]

    @property
    def norms(self) -> tuple[str, ...]:
        """Of the hidden size, in file order."""
        return (self.dense_post_norm, self.post_norm, self.norm)

    @property
    def running(self) -> tuple[str, ...]:
        """Modules in the order in which they run, behind the MLP."""
        return (self.dense_post_norm, self.router, self.norm, self.module, self.post_norm)

    def stacks(self, hidden_size: int) -> dict[str, tuple[int, int, int]]:
        """The two tensors that hold a matrix [out, in] of each expert, and their shapes."""
        up, down = (self.count, 2 * self.width, hidden_size), (self.count, hidden_size, self.width)
        return {self.gate_up: up, self.down: down}

    def tensors(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Names within the layer and shapes, in file order, without norms."""
        router = {f"{self.router}.weight": (self.count, hidden_size), self.expert_scale: (self.count,)}
        return {self.router_scale: (hidden_size,), **router, **self.stacks(hidden_size)}
