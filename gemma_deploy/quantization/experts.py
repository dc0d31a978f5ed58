"""Experts of a layer, each quantized on the tokens that it is given.

A few experts at a time, because moments of the hidden size are large: what their first matrices read is observed over
all windows, they are solved, and then the same for what their last ones read. The router stays as it is, so that the
choice is that of the model. Experts that no token of the calibration text came to are rounded to nearest, and told.
Where activations are rounded, the first matrices' inputs are, and some tokens of each expert say what that costs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from gemma_deploy.architectures import Experts
from gemma_deploy.calibration.executors import Executor
from gemma_deploy.calibration.observers import MomentObserver, quick_products
from gemma_deploy.calibration.segments import Route, stream_at
from gemma_deploy.calibration.shards import LayerPass, Shard, StatesByValue, shards_of
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.estimates import MOMENT_BYTES
from gemma_deploy.machine import give_memory_back
from gemma_deploy.quantization.rtn import quantize_rows_
from gemma_deploy.quantization.scales import choose_scales
from gemma_deploy.quantization.solver import QuantizedWeight, Settings, solve

log = logging.getLogger(__name__)
TOKENS_OF_ONE = 64  # inputs of an expert kept as they are, where activations are rounded


@dataclass(frozen=True)
class _Given:
    """A shard's task: what experts [start, stop) read; `last`: their last matrices, else their first ones."""

    shard: Shard
    route: Route
    start: int
    stop: int
    last: bool


@dataclass(frozen=True)
class Walked:
    """Windows on their way through a layer.

    Args:
        states: at `route`, in front of the MLP or inside it; ticked: called once per window and pass.
    """

    executor: Executor
    layer: LayerPass
    states: HiddenStates
    route: Route
    ticked: Callable[[], None]


def experts_at_once(experts: Experts, hidden_size: int) -> int:
    """How many are quantized together."""
    return max(1, min(experts.count, MOMENT_BYTES // (4 * hidden_size**2)))


def passes(experts: Experts | None, hidden_size: int) -> int:
    """Of all windows through a layer, that its experts take."""
    return 0 if experts is None else 2 * -(-experts.count // experts_at_once(experts, hidden_size))


@torch.inference_mode()
def quantize_experts(
    walked: Walked, settings: Settings
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Replace the matrices of a layer's experts by quantized ones.

    Returns:
        Codes [experts * out, in] and scales, by name within the layer; figures of both tensors; which experts no token
        came to, and how many tokens came to the others.
    """
    layer, spec = walked.layer, walked.layer.spec
    assert spec.experts is not None
    experts, found = spec.experts, dict[str, list[QuantizedWeight]]()
    how, tokens = replace(settings, equalize=False, activations=False), [0] * experts.count
    step = experts_at_once(experts, spec.hidden_size)
    for start in range(0, experts.count, step):
        stop = min(start + step, experts.count)
        for name in (experts.gate_up, experts.down):
            matrices = layer.module.get_parameter(name).data
            keep = TOKENS_OF_ONE if settings.activations and name == experts.gate_up else 0
            seen = _observe(walked, start, stop, columns=matrices.shape[2], last=name == experts.down, keep=keep)
            for expert, (observer, kept) in zip(range(start, stop), seen, strict=True):
                tokens[expert] = observer.count
                solved = _solved(matrices[expert], observer, how.linear(name), kept)
                matrices[expert] = solved.dequantized()
                found.setdefault(name, []).append(solved)
            del seen
            give_memory_back()
    tensors: dict[str, torch.Tensor] = {}
    for name, weights in found.items():
        scale = torch.cat([weight.scale for weight in weights])
        tensors[name] = torch.cat([weight.codes for weight in weights])
        tensors[f"{name}.scale"] = scale if settings.groupsize else scale[:, 0]
    unreached = [expert for expert, count in enumerate(tokens) if not count]
    if unreached:
        log.warning(
            "%s: no token of the calibration text came to %d of %d experts (%s): they are rounded to nearest",
            layer.name, len(unreached), experts.count, ", ".join(map(str, unreached)),
        )  # fmt: skip
    record = {"unreached": unreached, "fewest_tokens": min((one for one in tokens if one), default=0)}
    figures = {name: _figures(weights) for name, weights in found.items()}
    if settings.activations:
        noise = [count * one.activation_noise for count, one in zip(tokens, found[experts.gate_up], strict=True)]
        figures[experts.gate_up]["activation_noise"] = sum(noise) / max(1, sum(tokens))
    return tensors, figures, record


def _figures(weights: list[QuantizedWeight]) -> dict[str, Any]:
    """Sums over experts."""
    names = [one.name for one in fields(QuantizedWeight) if one.name in ("signal", "loss", "rtn_loss")]
    sums: dict[str, Any] = {name: sum(getattr(weight, name) for weight in weights) for name in names}
    return sums | {"rows_to_nearest": sum(weight.rows_to_nearest for weight in weights)}


def _solved(
    weight: torch.Tensor, observer: MomentObserver, settings: Settings, kept: list[torch.Tensor]
) -> QuantizedWeight:
    if observer.count:
        tokens = torch.cat(kept) if kept else None
        return solve([weight], observer.take(), settings, tokens=tokens).weights[0]
    scale = choose_scales(weight, settings.qmax, settings.groupsize, dtype=settings.scales)
    grouped = weight.reshape(scale.numel(), -1).clone()
    codes = torch.empty(grouped.shape, dtype=torch.int8)
    quantize_rows_(grouped, scale.reshape(-1), codes, scratch=torch.empty_like(grouped), qmax=settings.qmax)
    return QuantizedWeight(codes.view(weight.shape), scale, 0.0, 0.0, 0.0, len(weight))


@quick_products()
def _observe(
    walked: Walked, start: int, stop: int, *, columns: int, last: bool, keep: int
) -> list[tuple[MomentObserver, list[torch.Tensor]]]:
    """Moments of what experts [start, stop) read, over all windows, and about `keep` tokens of each.

    Shards are added in their order, and give as many tokens as the others.
    """
    executor, states = walked.executor, walked.states
    observers = [(MomentObserver(columns), list[torch.Tensor]()) for _ in range(start, stop)]
    shards = shards_of(*states.shape[:2])
    tasks = (
        _Given(
            Shard(shard, StatesByValue.of(states, shard) if executor.shares == "nothing" else states),
            walked.route, start, stop, last,
        )
        for shard in shards
    )  # fmt: skip
    with closing(executor.map(_given, walked.layer, tasks)) as results:
        for shard, result in zip(shards, results, strict=True):
            for expert, read in result.items():
                rows, (observer, kept) = torch.as_tensor(read), observers[expert - start]
                observer.update(rows)
                if keep:  # an odd step, as of `TokenObserver`
                    kept.append(rows[:: -(-len(rows) * len(shards) // keep) | 1].clone())
            for _ in shard:
                walked.ticked()
    return observers


@torch.inference_mode()
@quick_products()
def _given(layer: LayerPass, task: _Given) -> Mapping[int, Any]:
    """What each expert reads of a shard [tokens, columns], in the order of the tokens; none without tokens."""
    module, experts = layer.module, layer.spec.experts
    assert experts is not None
    norm, router = module.get_submodule(experts.norm), module.get_submodule(experts.router.rpartition(".")[0])
    read, chosen = [], []
    for window in task.shard.windows:
        stream = stream_at(layer, task.shard.states.read(window), task.route)
        read.append(norm(stream)[0])
        chosen.append(router(stream)[1][0])
    tokens, given = torch.cat(read), torch.cat(chosen)
    return {expert: one.numpy() for expert, one in _by_expert(layer, task, tokens, given)}


def _by_expert(
    layer: LayerPass, task: _Given, tokens: torch.Tensor, given: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    experts = layer.spec.experts
    assert experts is not None
    module = layer.module.get_submodule(experts.module)
    for expert in range(task.start, task.stop):
        own = (given == expert).any(-1)
        if not own.any():
            continue
        x = tokens[own]
        if task.last:
            gate, up = torch.nn.functional.linear(x, module.get_parameter("gate_up_proj")[expert]).chunk(2, dim=-1)
            x = module.get_submodule("act_fn")(gate) * up
        yield expert, x
