"""A decoder layer in segments, each from the inputs of one group of linears to those of the next.

What windows are between two segments is all that the rest of the layer needs: the residual stream, and beside it what
o_proj or down_proj will read. So a layer whose groups are quantized one after the other is walked through once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gemma_deploy.calibration.points import LAYER_INPUTS
from gemma_deploy.calibration.states import parts_of
from gemma_deploy.checkpoint import ModelConfig

if TYPE_CHECKING:
    from gemma_deploy.calibration.shards import LayerPass

ATTENTION, ATTENDED, MLP, PRODUCT = LAYER_INPUTS  # points: the first linear of each group
Seen = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class Route:
    """Where windows are in a layer.

    Args:
        start: the point they have reached; the first one is the layer's input.
        divisor: [columns] by which the weights divide, by now, what the linear there reads; None: as it was kept.
    """

    start: str = ATTENTION
    divisor: torch.Tensor | None = None


ENTERED = Route()


def state_columns(config: ModelConfig, point: str) -> int:
    """Values of a token when a point was reached."""
    beside = {ATTENDED: config.num_attention_heads * config.head_dim, PRODUCT: config.intermediate_size}
    return config.hidden_size + beside.get(point, 0)


def walk(layer: LayerPass, state: np.ndarray, route: Route, stop: str | None, seen: Seen) -> tuple[torch.Tensor, ...]:
    """Take a window from one point to another.

    Args:
        state: [seqlen, `state_columns`] at `route.start`, as `joined` lays it out.
        stop: a point not before that, None for the layer's output.
        seen: called with (point, what is read there [1, seqlen, channels]) on the way.

    Returns:
        The state at `stop` in parts [1, seqlen, columns].
    """
    module, config, at = layer.module, layer.frame.model.config, route.start
    four_norms = config.model_type != "gemma"
    hidden, made = (torch.from_numpy(part)[None] for part in parts_of(state, config.hidden_size))
    if route.divisor is not None:
        made = made / route.divisor
    if at == ATTENTION:
        x = module.input_layernorm(hidden)
        seen(ATTENTION, x)
        if stop == ATTENTION:
            return (hidden,)
        made, at = layer.read_at(ATTENDED, module.self_attn, x, *layer.attention_inputs()), ATTENDED
        seen(ATTENDED, made)
        if stop == ATTENDED:
            return hidden, made
    if at in (ATTENDED, MLP):
        if at == ATTENDED:
            attended = module.self_attn.o_proj(made)
            hidden = hidden + (module.post_attention_layernorm(attended) if four_norms else attended)
        x = (module.pre_feedforward_layernorm if four_norms else module.post_attention_layernorm)(hidden)
        seen(MLP, x)
        if stop == MLP:
            return (hidden,)
        made = layer.read_at(PRODUCT, module.mlp, x)
        seen(PRODUCT, made)
        if stop == PRODUCT:
            return hidden, made
    product = module.mlp.down_proj(made)
    return (hidden + (module.post_feedforward_layernorm(product) if four_norms else product),)
