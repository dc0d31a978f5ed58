"""A decoder layer that carries several streams along, in segments as in segments.py: Gemma 3n's AltUp and LAuReL.

The formulas are those of `architectures.AltUp` and `architectures.Laurel`, computed by the layer's own modules in the
order of its forward, so that a walk gives its bits. All streams of a token lie behind each other, [carried].
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch

from gemma_deploy.calibration import segments
from gemma_deploy.calibration.segments import NOTHING, Beside, Route, Seen, Walkable, begun

ATTENDED, GATED, CORRECTED = 2, 3, 5  # the groups behind attention, of the MLP's input, behind the correction


def walk(
    layer: Walkable, state: np.ndarray, route: Route, *, stop: str | None, seen: Seen, beside: Beside = NOTHING
) -> tuple[torch.Tensor, ...]:
    """See `segments.walk`; the layer has one stream or several."""
    if layer.spec.altup is None:
        return segments.walk(layer, state, route, stop=stop, seen=seen, beside=beside)
    module, spec = cast(Any, layer.module), layer.spec
    begin, (stream, made) = begun(layer, state, route)
    if begin < ATTENDED:
        parts = _to_attention(layer, begin, (stream, made), stop=stop, seen=seen, beside=beside)
        if stop in [group.observed for group in spec.groups[: ATTENDED + 1]]:
            return parts
        stream, made = parts
    if begin < CORRECTED:
        parts = _to_correction(layer, begin, (stream, made), stop=stop, seen=seen)
        if stop in [group.observed for group in spec.groups[GATED:CORRECTED]]:
            return parts
        (stream,) = parts
    per_layer, streams = spec.per_layer, _apart(layer, stream)
    assert per_layer is not None
    if begin <= CORRECTED:
        first = module.altup(_active(layer, streams))
        seen(per_layer.gate, first)
        if stop == per_layer.gate:
            return (stream,)
        made = module.gated(first, beside.vectors)
        seen(per_layer.projection, made)
        if stop == per_layer.projection:
            return stream, made
    own = module.get_submodule(per_layer.norm)(module.get_submodule(per_layer.projection)(made))
    return (torch.cat((streams[:, :, :1], streams[:, :, 1:] + own.unsqueeze(2)), dim=2).flatten(2),)


def _to_attention(
    layer: Walkable,
    begin: int,
    parts: tuple[torch.Tensor, torch.Tensor],
    *,
    stop: str | None,
    seen: Seen,
    beside: Beside,
) -> tuple[torch.Tensor, ...]:
    """From the layer's input, or from LAuReL's second linear, to what attention's last linear reads."""
    module, spec, (stream, made) = cast(Any, layer.module), layer.spec, parts
    attention, laurel = spec.branches[0], spec.laurel
    assert laurel is not None
    predicted = _apart(layer, stream) if begin else module.altup.predict(_apart(layer, stream))
    normed = module.get_submodule(attention.norm)(_active(layer, predicted))
    if not begin:
        seen(attention.entry.observed, normed)
        if stop == attention.entry.observed:
            return (stream,)
        stream, made = predicted.flatten(2), module.get_submodule(laurel.left)(normed)
        seen(laurel.right, made)
        if stop == laurel.right:
            return stream, made
    residual = normed + module.get_submodule(laurel.norm)(module.get_submodule(laurel.right)(made))
    inputs = layer.attention_inputs() if beside.shared is None else (*layer.attention_inputs(), None, beside.shared)
    made = layer.read_at(attention.output, module.get_submodule(attention.module), normed, *inputs)
    seen(attention.output, made)
    return torch.cat((stream, residual), dim=-1), made


def _to_correction(
    layer: Walkable, begin: int, parts: tuple[torch.Tensor, torch.Tensor], *, stop: str | None, seen: Seen
) -> tuple[torch.Tensor, ...]:
    """From there, or from inside the MLP, to the corrected streams."""
    module, spec, (stream, made) = cast(Any, layer.module), layer.spec, parts
    attention, mlp = spec.branches
    expected, x = stream[..., : spec.carried], stream[..., spec.carried :]
    predicted = _apart(layer, expected)
    if begin <= ATTENDED:  # x is LAuReL
        added = module.get_submodule(str(attention.post_norm))(module.get_submodule(attention.output)(made))
        x = (_active(layer, predicted) + added + x) / math.sqrt(2)
    if begin <= GATED:
        normed = module.get_submodule(mlp.norm)(x)
        seen(mlp.entry.observed, normed)
        if stop == mlp.entry.observed:
            return (torch.cat((expected, x), dim=-1),)
        made = layer.read_at(mlp.output, module.get_submodule(mlp.module), normed)
        seen(mlp.output, made)
        if stop == mlp.output:
            return torch.cat((expected, x), dim=-1), made
    x = x + module.get_submodule(str(mlp.post_norm))(module.get_submodule(mlp.output)(made))
    return (module.altup.correct(predicted, x).flatten(2),)


def _apart(layer: Walkable, carried: torch.Tensor) -> torch.Tensor:
    """[1, seqlen, carried] -> [1, seqlen, streams, hidden]."""
    return carried.unflatten(-1, (-1, layer.spec.hidden_size))


def _active(layer: Walkable, streams: torch.Tensor) -> torch.Tensor:
    """The stream that the layer computes, [1, seqlen, hidden]."""
    assert layer.spec.altup is not None
    return streams[:, :, layer.spec.altup.active]
