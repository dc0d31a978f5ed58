"""What layers of some generations have beside attention and MLP: vectors of tokens, experts, LAuReL, streams."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_deploy.names import PER_LAYER_NORM, PER_LAYER_PROJECTION


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
    """The table of such vectors: [rows, layers * size], beside it a projection of the embeddings of the same width.

    Tokens that it has no row for have the first one's. What the projection gives is normed, vector by vector, and a
    layer's vector is (row + normed) / sqrt(2); without a table it is what is normed.

    Args:
        rows: 0 where there is no table.
        projection, norm: modules of the model.
    """

    rows: int
    layers: int
    size: int
    projection: str = PER_LAYER_PROJECTION
    norm: str = PER_LAYER_NORM

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
        router: the linear [count, hidden]; router_norm: in front of it, without weights; router_scale: [hidden];
            expert_scale: [count].
        gate_up: the tensor [count, 2 * width, hidden], gates first; down: [count, hidden, width].
    """

    count: int
    chosen: int
    width: int
    dense_post_norm: str = "post_feedforward_layernorm_1"
    norm: str = "pre_feedforward_layernorm_2"
    post_norm: str = "post_feedforward_layernorm_2"
    router: str = "router.proj"
    router_norm: str = "router.norm"
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


@dataclass(frozen=True)
class Laurel:
    """A learned residual beside attention: z + norm(right(left(z))), z being what attention reads.

    The stream is (x + post_norm(attention(z)) + laurel) / sqrt(2) then.

    Args:
        rank: of the two linears.
    """

    rank: int
    left: str = "laurel.linear_left"
    right: str = "laurel.linear_right"
    norm: str = "laurel.post_laurel_norm"


@dataclass(frozen=True)
class AltUp:
    """Alternating updates: a layer computes one of several streams, and small maps carry the others along.

    With r(x) = tanh(router(norm(x) / hidden size)), streams s and what the layer makes of p_active, y:
    p_j = s_j + sum_i C_ji s_i, C = prediction(r(s_active)) as [streams, streams];
    s_j = p_j + (y - p_active) * (correction(r(y))_j + 1). What is added of a token's vector is made of
    s_active * scale, and added to all streams but the first.

    Args:
        streams: how many; active: the one that is computed.
        router, prediction, correction: matrices, of float32 in every artifact; norm: of the hidden size; scale: a
            tensor of that size.
    """

    streams: int
    active: int
    router: str = "altup.modality_router"
    prediction: str = "altup.prediction_coefs"
    correction: str = "altup.correction_coefs"
    norm: str = "altup.router_norm"
    scale: str = "altup.correct_output_scale"

    def coefficients(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """Names within a layer and shapes of the small matrices."""
        return {
            self.correction: (self.streams, self.streams),
            self.prediction: (self.streams**2, self.streams),
            self.router: (self.streams, hidden_size),
        }
