"""The streaming pass of `calibrate`: ranges of all activations, one layer's weights in memory at a time."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gemma_deploy.calibration.beside import ReadBeside
from gemma_deploy.calibration.executors import Executor, Here
from gemma_deploy.calibration.layer_weights import embed, head_input, loaded, refuse_nonfinite
from gemma_deploy.calibration.observers import RangeObserver
from gemma_deploy.calibration.points import CACHED
from gemma_deploy.calibration.shards import (
    LayerPass,
    LayerSetting,
    Shard,
    StackTemplate,
    StatesByValue,
    StateStore,
    cache_rows,
    empty_states,
    shards_of,
)
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.names import NORM
from gemma_deploy.progress import Tick

Ranges = dict[str, RangeObserver]


@torch.inference_mode()
def run_layers(
    checkpoint: WeightSource,
    ids: np.ndarray,
    *,
    scratch: Path,
    embed_scale: str = "exact",
    progress: Tick | None = None,
    executor: Executor | None = None,
) -> Ranges:
    """Run every window through every layer in float32.

    Windows go one at a time, so that the numbers do not depend on how many there are.

    Args:
        checkpoint: whose weights; only its rows are read.
        ids: [nsamples, seqlen] token ids.
        scratch: directory for the hidden states when they do not fit in memory.
        embed_scale: "exact" or "bf16", as in the recipe.
        progress: called with (windows passed through layers, all of them).
        executor: where they pass, threads of this process when None. The numbers are the same.

    Returns:
        What was seen at each point, `MODULE.in` and `MODULE.out`, see points.py.

    Raises:
        CalibrationError: the table, a layer or the norm gives NaN or infinity, the disk is full, or a worker ended.
        NotBuiltError: there is no patched model for this generation.
    """
    executor = executor or Here()
    nsamples, seqlen = ids.shape
    config, ranges, done = checkpoint.config, Ranges(), 0
    stack_template = StackTemplate(LayerSetting(config, embed_scale, seqlen, checkpoint.path))
    shape, file = (nsamples, seqlen, config.carried), scratch / "hidden_states.f32"
    states = HiddenStates(shape, file, 0) if executor.shares == "disk" else HiddenStates(shape, file)
    beside = ReadBeside(config, scratch, ids.shape)
    with closing(states), closing(beside):
        beside.make_vectors(checkpoint, stack_template.stack, ids)
        embed(checkpoint, ids, stack_template.stack, states=states)
        for index in range(config.num_hidden_layers):
            layer = LayerPass(stack_template, index)
            shards, carry = shards_of(nsamples, seqlen), executor.shares == "nothing"
            kept = beside.kept(layer.spec)
            tasks = (
                _Task(
                    beside.shard(executor, layer.spec, states=states, windows=shard),
                    None if carry else states,
                    kept is not None,
                    None if carry else kept,
                )
                for shard in shards
            )
            with loaded(layer.module, checkpoint, layer.name), closing(executor.map(_pass, layer, tasks)) as results:
                for shard, (found, following, present) in zip(shards, results, strict=True):
                    for point, seen in found.items():
                        ranges.setdefault(point, RangeObserver()).merge(seen)
                    if following is not None:
                        following.into(states)
                    if present is not None and kept is not None:
                        present.into(kept)
                    for _ in shard:
                        done += 1
                        if progress:
                            progress(done, config.num_hidden_layers * nsamples)
        head = ranges["lm_head.in"] = RangeObserver()
        with head_input(checkpoint, stack_template.stack) as made:
            for window in range(nsamples):
                hidden = made(states.read(window))
                refuse_nonfinite(hidden, checkpoint.path, NORM, window=window)
                head.update(hidden)
    return ranges


@dataclass(frozen=True)
class _Task:
    """A shard, and where what the layer gives goes, None to return it.

    Args:
        keep: whether keys and values are wanted; kept: where they go, None to return them.
    """

    shard: Shard
    target: StateStore | None
    keep: bool
    kept: StateStore | None


@torch.inference_mode()
def _pass(layer: LayerPass, task: _Task) -> tuple[Ranges, StatesByValue | None, StatesByValue | None]:
    """A shard through a layer: ranges of its inputs and its output; and the output, keys and values unless written."""
    ranges, present = Ranges(), dict[str, torch.Tensor]()
    by_value = empty_states(layer, task.shard.windows) if task.target is None else None
    made = empty_states(layer, task.shard.windows, CACHED) if task.keep and task.kept is None else None
    target, kept = task.target or by_value, task.kept or made
    assert target is not None

    def seen(name: str, x: torch.Tensor) -> None:
        ranges.setdefault(name, RangeObserver()).update(x)

    for window in task.shard.windows:
        hidden = layer.run(
            task.shard.states.read(window),
            lambda linear, x: seen(f"{layer.name}.{linear}.in", x),
            present.__setitem__,
            beside=task.shard.beside(window, layer.spec),
        )
        refuse_nonfinite(hidden, layer.path, layer.name, window=window)
        seen(f"{layer.name}.out", hidden)
        target.write(window, hidden[0].numpy())
        if kept is not None:
            kept.write(window, *cache_rows(present))
    return ranges, by_value, made
