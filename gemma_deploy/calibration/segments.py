"""A decoder layer in segments, each from the inputs of one group of linears to those of the next.

What windows are between two segments is all that the rest of the layer needs: the residual stream, and beside it what
o_proj, down_proj or per_layer_projection will read. So a layer whose groups are quantized one after the other is walked
through once. Layers that carry several streams along are walked through in streams.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.calibration.states import parts_of

Seen = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class Route:
    """Where windows are in a layer.

    Args:
        start: the linear whose input they have reached; None: the layer's input.
        divisor: [columns] by which the weights divide, by now, what the linear there reads; None: as it was kept.
    """

    start: str | None = None
    divisor: torch.Tensor | None = None


ENTERED = Route()


@dataclass(frozen=True)
class Beside:
    """What a layer reads of a window beside hidden states; most layers: nothing.

    Args:
        vectors: [1, seqlen, size], of each token for this layer.
        shared: the keys and values of an earlier layer, normed and turned, [1, Hk, seqlen, D] each.
    """

    vectors: torch.Tensor | None = None
    shared: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As the layer takes them."""
        named = {"per_layer_input": self.vectors, "shared": self.shared}
        return {name: value for name, value in named.items() if value is not None}


NOTHING = Beside()


class Walkable(Protocol):
    """A layer with its weights, as `walk` needs it."""

    module: nn.Module
    spec: LayerSpec

    def attention_inputs(self) -> tuple[Any, ...]:
        """What the attention takes besides hidden states: rotary tables and mask."""

    def read_at(self, point: str, module: nn.Module, x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        """What the linear `point` reads [1, seqlen, channels] when `module` is given `x`."""


def _beside(module: nn.Module, added: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """What the MLP makes, and the experts beside it."""
    both: torch.Tensor = cast(Any, module).with_experts(added, hidden)
    return both


def stream_at(layer: Walkable, state: np.ndarray, route: Route) -> torch.Tensor:
    """What the MLP and the experts beside it read, before their norms: [1, seqlen, hidden].

    Args:
        state: at `route.start`, which is not behind the MLP.
    """
    mlp = layer.spec.branches[-1]
    if route.start in (mlp.entry.observed, mlp.output):
        return torch.from_numpy(parts_of(state, layer.spec.hidden_size)[0])[None]
    return walk(layer, state, route, stop=mlp.entry.observed, seen=lambda point, x: None)[0]


def stream_columns(layer: LayerSpec, point: str | None) -> int:
    """Values of a token when a point was reached, without what its linear will read.

    Of a layer with several streams: what is expected of them, LAuReL until attention is added, then the computed one.
    """
    attention, mlp = layer.branches[0], layer.branches[-1]
    computed = layer.altup is not None and point in (attention.output, mlp.entry.observed, mlp.output)
    return layer.carried + (layer.hidden_size if computed else 0)


def state_columns(layer: LayerSpec, point: str) -> int:
    """Values of a token when a point was reached."""
    waiting = {branch.output for branch in layer.branches}
    if layer.per_layer is not None:
        waiting.add(layer.per_layer.projection)
    if layer.laurel is not None:
        waiting.add(layer.laurel.right)
    return stream_columns(layer, point) + (layer.linear(point).in_features if point in waiting else 0)


def begun(layer: Walkable, state: np.ndarray, route: Route) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
    """The number of the group that a window has reached, and its state there: the stream, and what the linear reads."""
    points = [group.observed for group in layer.spec.groups]
    stream, made = (torch.from_numpy(part)[None] for part in parts_of(state, stream_columns(layer.spec, route.start)))
    if route.divisor is not None:
        made = made / route.divisor
    return 0 if route.start is None else points.index(route.start), (stream, made)


def walk(
    layer: Walkable, state: np.ndarray, route: Route, *, stop: str | None, seen: Seen, beside: Beside = NOTHING
) -> tuple[torch.Tensor, ...]:
    """Take a window from one point to another, in a layer of one stream.

    Args:
        state: [seqlen, `state_columns`] at `route.start`, as `joined` lays it out.
        stop: a point not before that, None for the layer's output.
        seen: called with (point, what is read there [1, seqlen, channels]) on the way.
        beside: what the layer reads of the window besides.

    Returns:
        The state at `stop` in parts [1, seqlen, columns].
    """
    module, spec = layer.module, layer.spec
    begin, (hidden, made) = begun(layer, state, route)
    for number, branch in enumerate(spec.branches):
        entry, leaving = branch.entry.observed, branch.output
        if begin <= 2 * number:
            x = module.get_submodule(branch.norm)(hidden)
            seen(entry, x)
            if stop == entry:
                return (hidden,)
            inputs = layer.attention_inputs() if branch.attends else ()
            if branch.attends and beside.shared is not None:
                inputs = (*inputs, None, beside.shared)
            made = layer.read_at(leaving, module.get_submodule(branch.module), x, *inputs)
            seen(leaving, made)
            if stop == leaving:
                return hidden, made
        if begin <= 2 * number + 1:
            added = module.get_submodule(leaving)(made)
            if spec.experts is not None and not branch.attends:
                added = _beside(module, added, hidden)
            hidden = hidden + (module.get_submodule(branch.post_norm)(added) if branch.post_norm else added)
    if spec.per_layer is not None:
        gate, projection = spec.per_layer.gate, spec.per_layer.projection
        if begin < len(spec.groups) - 1:
            seen(gate, hidden)
            if stop == gate:
                return (hidden,)
            made = module.gated(hidden, beside.vectors)
            seen(projection, made)
            if stop == projection:
                return hidden, made
        added = module.get_submodule(projection)(made)
        hidden = hidden + module.get_submodule(spec.per_layer.norm)(added)
    return (hidden if spec.scalar is None else hidden * module.get_buffer(spec.scalar),)
