"""Stages: runs of consecutive layers; the first also holds the embedding, the last the final norm and the LM head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from gemma_deploy.errors import UsageError
from gemma_deploy.names import LAYERS, PER_LAYER_NORM, PER_LAYER_PROJECTION, PER_LAYER_TABLE, STREAM_PROJECTION

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

BOTTOM, TRUNK, TOP, WHOLE = "bottom", "trunk", "top", "whole"


@dataclass(frozen=True)
class Span:
    """Layers [start, stop) of a model.

    Args:
        name: `bottom`, `trunk` (`trunk1`, `trunk2`, ... when there are several), `top`; `whole` of an undivided model.
        embeds: it turns token ids into hidden states; heads: it turns hidden states into logits.
    """

    name: str
    start: int
    stop: int
    embeds: bool
    heads: bool

    @property
    def kind(self) -> str:
        """`bottom`, `trunk`, `top` or `whole`."""
        return TRUNK if self.name.startswith(TRUNK) else self.name

    def holds(self, name: str, tied: bool, *, own_vectors: bool = False) -> bool:
        """Whether a tensor of the whole model (its Hugging Face name) belongs to this stage.

        Args:
            tied: the LM head is the embedding table, which the last stage holds as well then.
            own_vectors: every stage makes the vectors of tokens that its own layers add, and has shares of the tensors
                for it; else the first one makes all.
        """
        if name.startswith(LAYERS):
            return self.start <= int(name.removeprefix(LAYERS).partition(".")[0]) < self.stop
        if name.startswith("model.embed_tokens."):
            return self.embeds or (self.heads and tied)
        if name.startswith(tuple(f"{module}." for module in (PER_LAYER_TABLE, PER_LAYER_PROJECTION, PER_LAYER_NORM))):
            return self.embeds or own_vectors
        if name.startswith(f"{STREAM_PROJECTION}."):
            return self.embeds
        return self.heads


def spans_of(layers: int, points: Sequence[int]) -> tuple[Span, ...]:
    """Cut `layers` layers in front of each of `points`; no point gives one stage, `whole`.

    Raises:
        UsageError: points that do not increase, or leave a stage without a layer.
    """
    edges = [0, *points, layers]
    if any(stop <= start for start, stop in pairwise(edges)):
        raise UsageError(
            f"split points {list(points)} do not cut {layers} layers into stages of at least one layer each",
            expected=f"increasing numbers between 1 and {layers - 1}: layer numbers that begin a new stage",
            next_step="`gemma-deploy split CHECKPOINT` shows points that balance the bytes",
        )
    count = len(edges) - 1
    if count == 1:
        return (Span(WHOLE, 0, layers, True, True),)
    trunks = [TRUNK] if count == 3 else [f"{TRUNK}{i}" for i in range(1, count - 1)]
    names = [BOTTOM, *trunks, TOP]
    return tuple(
        Span(name, start, stop, start == 0, stop == layers)
        for name, (start, stop) in zip(names, pairwise(edges), strict=True)
    )


@dataclass(frozen=True)
class Share:
    """Rows or columns [start, stop) of a tensor, those of a part's own layers."""

    axis: int
    start: int
    stop: int

    def of_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the share of a tensor of that shape."""
        return tuple(self.stop - self.start if axis == self.axis else size for axis, size in enumerate(shape))


def shares_of(config: ModelConfig, span: Span) -> dict[str, Share]:
    """The tensors of which a part in PyTorch holds what belongs to its layers: the table of vectors, its projection."""
    vectors = config.per_layer
    if vectors is None or not vectors.rows or span.name == WHOLE:
        return {}
    edges = span.start * vectors.size, span.stop * vectors.size
    return {f"{PER_LAYER_TABLE}.weight": Share(1, *edges), f"{vectors.projection}.weight": Share(0, *edges)}


def whole(layers: int) -> Span:
    """The undivided model as its only stage."""
    return spans_of(layers, ())[0]


def span_bytes(config: ModelConfig, span: Span, sizes: Mapping[str, int] | None = None) -> int:
    """Bytes of the tensors of a part in PyTorch, which has vectors of tokens for its own layers alone.

    Args:
        sizes: bytes by tensor name; two a number by default.
    """
    if sizes is None:
        from gemma_deploy.checkpoint.expected import expected_tensors

        sizes = {name: 2 * math.prod(shape) for name, shape in expected_tensors(config).items()}
    held = {
        name: size for name, size in sizes.items() if span.holds(name, config.tie_word_embeddings, own_vectors=True)
    }
    for name in shares_of(config, span):
        held[name] = held[name] * (span.stop - span.start) // config.num_hidden_layers
    return sum(held.values())


def recommended_points(config: ModelConfig, parts: int = 3, sizes: Mapping[str, int] | None = None) -> tuple[int, ...]:
    """Split points that make the largest part as small as it can be, counted in bytes.

    The embedding table counts, twice when it is tied: the first part reads it as the table, the last as the LM head.
    Among equals all parts but the last are as even as they can be, and so on down to the first; then the points are
    the earliest.

    Raises:
        UsageError: more parts than layers.
    """
    layers = config.num_hidden_layers
    if not 1 <= parts <= layers:
        raise UsageError(
            f"{layers} layers do not make {parts} parts of at least one layer each", next_step="ask for fewer parts"
        )
    if parts == 1:
        return ()

    def size(start: int, stop: int) -> int:
        return span_bytes(config, Span("", start, stop, start == 0, stop == layers), sizes)

    # best[stop]: (largest part, points) of layers [0, stop) in the parts so far
    best = {stop: (size(0, stop), tuple[int, ...]()) for stop in range(1, layers)}
    for done in range(2, parts + 1):
        last = done == parts
        stops = [layers] if last else range(done, layers)
        before = best
        best = {
            stop: min((max(most, size(at, stop)), (*points, at)) for at, (most, points) in before.items() if at < stop)
            for stop in stops
        }
    return best[layers][1]
