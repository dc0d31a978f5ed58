"""Passes of all windows through a layer, shared out by an executor: moments of linears' inputs, and the next states.

Shards are added in their order, whoever computed them (calibration/shards.py says why that gives the same bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from gemma_deploy.calibration.executors import Executor
from gemma_deploy.calibration.observers import MOMENT_BLOCK, MomentObserver, moment_block
from gemma_deploy.calibration.shards import Carried, LayerPass, Shard, Windows, advance, inputs, shards_of
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.errors import CalibrationError

FOLDER = "shards"  # what processes of one machine hand to each other, beside the states


@dataclass(frozen=True)
class _Observation:
    """A shard's task: linears whose inputs to observe, and the file for the result, None to return it."""

    shard: Shard
    points: tuple[str, ...]
    file: Path | None


@dataclass(frozen=True)
class _Step:
    """A shard's task: where the next states go, None to return them."""

    shard: Shard
    target: Windows | None


@dataclass(frozen=True)
class _Addition:
    """A block of a sum in this process, and what is added to it, in this order."""

    observer: MomentObserver
    start: int
    inputs: list[torch.Tensor]


@torch.inference_mode()
def observe(
    executor: Executor, layer: LayerPass, points: Sequence[str], states: HiddenStates, ticked: Callable[[], None]
) -> dict[str, MomentObserver]:
    """Moments of the inputs of some linears over all windows.

    Args:
        points: linears of the layer, in the order in which they run; the pass ends where the last one is read.
        ticked: called once per window.

    Raises:
        CalibrationError: a worker ended, or the disk is full.
    """
    found = {point: MomentObserver(layer.module.get_submodule(point).in_features) for point in points}
    shards, folder = shards_of(*states.shape[:2]), scratch_of(states.file.parent)
    if executor.shares == "disk":
        folder.mkdir(exist_ok=True)
    tasks = (
        _Observation(
            Shard(shard, _source(executor, states, shard)),
            tuple(points),
            folder / f"moments-{shard.start}.f32" if executor.shares == "disk" else None,
        )
        for shard in shards
    )
    if executor.shares == "memory":
        _observe_here(executor, layer, tasks, found, ticked)
        return found
    with closing(executor.map(_moments, layer, tasks)) as results:
        for shard, result in zip(shards, results, strict=True):
            blocks = _read(result, found) if isinstance(result, Path) else iter(result)
            for observer in found.values():
                for start in observer.starts():
                    observer.add(start, torch.from_numpy(np.array(next(blocks))))
                observer.count += len(shard) * states.shape[1]
            if isinstance(result, Path):
                result.unlink()
            del result, blocks
            _tick(shard, ticked)
    return found


def step(
    executor: Executor, layer: LayerPass, states: HiddenStates, following: HiddenStates, ticked: Callable[[], None]
) -> None:
    """Write what the layer gives for `states` into `following`.

    Raises:
        CalibrationError: NaN or infinity, or a worker ended.
    """
    shards = shards_of(*states.shape[:2])
    target = None if executor.shares == "nothing" else following
    tasks = (_Step(Shard(shard, _source(executor, states, shard)), target) for shard in shards)
    with closing(executor.map(_advance, layer, tasks)) as results:
        for shard, result in zip(shards, results, strict=True):
            if result is not None:
                result.into(following)
            _tick(shard, ticked)


def scratch_of(folder: Path) -> Path:
    """Where processes of one machine hand results to each other, beside the hidden states."""
    return folder / FOLDER


def _source(executor: Executor, states: HiddenStates, shard: range) -> Windows:
    return Carried.of(states, shard) if executor.shares == "nothing" else states


def _tick(shard: range, ticked: Callable[[], None]) -> None:
    for _ in shard:
        ticked()


def _observe_here(
    executor: Executor,
    layer: LayerPass,
    tasks: Iterator[_Observation],
    found: dict[str, MomentObserver],
    ticked: Callable[[], None],
) -> None:
    """A few shards at a time, then their products block by block: no second array of the sum's size."""
    while batch := list(islice(tasks, executor.width)):
        with closing(executor.map(_inputs, layer, batch)) as results:
            seen = list(results)
        additions = (
            _Addition(observer, start, [x[point] for x in seen])
            for point, observer in found.items()
            for start in observer.starts()
        )
        with closing(executor.map(_add, layer, additions)) as done:
            for _ in done:
                pass
        for task, x in zip(batch, seen, strict=True):
            for point, observer in found.items():
                observer.count += len(x[point])
            _tick(task.shard.windows, ticked)


def _inputs(layer: LayerPass, task: _Observation) -> dict[str, torch.Tensor]:
    return inputs(layer, task.shard, task.points)


@torch.inference_mode()
def _add(layer: LayerPass, task: _Addition) -> None:
    for x in task.inputs:
        task.observer.add(task.start, moment_block(x, task.start))


def _advance(layer: LayerPass, task: _Step) -> Carried | None:
    return advance(layer, task.shard, task.target)


@torch.inference_mode()
def _moments(layer: LayerPass, task: _Observation) -> Path | list[np.ndarray]:
    """Sums of a shard as blocks, of one point after another: in the task's file, or returned."""
    seen = inputs(layer, task.shard, task.points)
    blocks = (
        moment_block(seen[point], start).numpy()
        for point in task.points
        for start in range(0, seen[point].shape[1], MOMENT_BLOCK)
    )
    if task.file is None:
        return list(blocks)
    try:
        with open(task.file, "wb") as file:
            for block in blocks:
                file.write(np.ascontiguousarray(block).data)
    except OSError as error:
        raise CalibrationError(
            f"no room for the moments of a shard: {error.strerror or error}",
            where=str(task.file),
            expected=f"{sum(2 * x.shape[1] ** 2 for x in seen.values()) / 1e6:.0f} MB free for each process",
            next_step="make room there, or set workspace.workers: 1, which needs none (the results are the same)",
        ) from error
    return task.file


def _read(file: Path, found: dict[str, MomentObserver]) -> Iterator[np.ndarray]:
    """The blocks that `_moments` wrote."""
    with open(file, "rb") as opened:
        for observer in found.values():
            columns = len(observer.total)
            for start in observer.starts():
                shape = min(MOMENT_BLOCK, columns - start), columns - start
                yield np.fromfile(opened, np.float32, shape[0] * shape[1]).reshape(shape)
