"""Passes of all windows through a layer, shared out by an executor: what linears read, and the next states.

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
from gemma_deploy.calibration.observers import MOMENT_BLOCK, MomentObserver, TokenObserver, moment_block
from gemma_deploy.calibration.shards import Carried, LayerPass, Shard, Windows, advance, inputs, shards_of
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.errors import CalibrationError

FOLDER = "shards"  # what processes of one machine hand to each other, beside the states


@dataclass(frozen=True)
class Observers:
    """Of the inputs of one linear: moments of all of them, and on request some as they are."""

    moments: MomentObserver
    tokens: TokenObserver | None = None


@dataclass(frozen=True)
class _Observation:
    """A shard's task: linears whose inputs to observe, who picks tokens, and the file for the result or None."""

    shard: Shard
    points: tuple[str, ...]
    tokens: TokenObserver | None
    file: Path | None

    def kept(self, layer: LayerPass, x: torch.Tensor) -> torch.Tensor:
        """The tokens to keep of the shard's [tokens, channels]; none where nobody asked for some."""
        first = self.shard.windows.start * layer.frame.model.seqlen
        return x[:0] if self.tokens is None else self.tokens.kept(first, x)


@dataclass(frozen=True)
class _Step:
    """A shard's task: where the next states go, None to return them; whether to look at what a cache would hold."""

    shard: Shard
    target: Windows | None
    cache: bool


@dataclass(frozen=True)
class _Addition:
    """A block of a sum in this process, and what is added to it, in this order."""

    observer: MomentObserver
    start: int
    inputs: list[torch.Tensor]


@torch.inference_mode()
def observe(
    executor: Executor,
    layer: LayerPass,
    points: Sequence[str],
    states: HiddenStates,
    ticked: Callable[[], None],
    tokens: int = 0,
) -> dict[str, Observers]:
    """What some linears read, over all windows.

    Args:
        points: linears of the layer, in the order in which they run; the pass ends where the last one is read.
        ticked: called once per window.
        tokens: that are kept of each input, at most.

    Raises:
        CalibrationError: a worker ended, or the disk is full.
    """
    seen = states.shape[0] * states.shape[1]
    found = {
        point: Observers(
            MomentObserver(layer.module.get_submodule(point).in_features),
            TokenObserver(seen, tokens) if tokens else None,
        )
        for point in points
    }
    shards, folder = shards_of(*states.shape[:2]), scratch_of(states.file.parent)
    if executor.shares == "disk":
        folder.mkdir(exist_ok=True)
    tasks = (
        _Observation(
            Shard(shard, _source(executor, states, shard)),
            tuple(points),
            TokenObserver(seen, tokens) if tokens else None,
            folder / f"moments-{shard.start}.f32" if executor.shares == "disk" else None,
        )
        for shard in shards
    )
    if executor.shares == "memory":
        _observe_here(executor, layer, tasks, found, ticked)
        return found
    with closing(executor.map(_moments, layer, tasks)) as results:
        for shard, result in zip(shards, results, strict=True):
            blocks = _read(result) if isinstance(result, Path) else iter(result)
            for observers in found.values():
                moments = observers.moments
                for start in moments.starts():
                    moments.add(start, torch.from_numpy(np.array(next(blocks))))
                moments.count += len(shard) * states.shape[1]
                if observers.tokens is not None:
                    observers.tokens.add(torch.from_numpy(np.array(next(blocks))))
            if isinstance(result, Path):
                result.unlink()
            del result, blocks
            _tick(shard, ticked)
    return found


def step(
    executor: Executor,
    layer: LayerPass,
    states: HiddenStates,
    following: HiddenStates,
    ticked: Callable[[], None],
    cache: bool = False,
) -> dict[str, torch.Tensor]:
    """Write what the layer gives for `states` into `following`.

    Args:
        cache: look at what a cache would hold.

    Returns:
        The largest magnitude of each channel [Hk, D] of "key" and "value"; nothing unless asked for.

    Raises:
        CalibrationError: NaN or infinity, or a worker ended.
    """
    shards = shards_of(*states.shape[:2])
    target = None if executor.shares == "nothing" else following
    tasks = (_Step(Shard(shard, _source(executor, states, shard)), target, cache) for shard in shards)
    maxima: dict[str, torch.Tensor] = {}
    with closing(executor.map(_advance, layer, tasks)) as results:
        for shard, (carried, found) in zip(shards, results, strict=True):
            if carried is not None:
                carried.into(following)
            for part, largest in found.items():
                seen = torch.from_numpy(np.array(largest))
                maxima[part] = torch.maximum(maxima[part], seen) if part in maxima else seen
            _tick(shard, ticked)
    return maxima


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
    found: dict[str, Observers],
    ticked: Callable[[], None],
) -> None:
    """A few shards at a time, then their products block by block: no second array of the sum's size."""
    while batch := list(islice(tasks, executor.width)):
        with closing(executor.map(_inputs, layer, batch)) as results:
            seen = list(results)
        additions = (
            _Addition(observers.moments, start, [x[point] for x in seen])
            for point, observers in found.items()
            for start in observers.moments.starts()
        )
        with closing(executor.map(_add, layer, additions)) as done:
            for _ in done:
                pass
        for task, x in zip(batch, seen, strict=True):
            for point, observers in found.items():
                observers.moments.count += len(x[point])
                if observers.tokens is not None:
                    observers.tokens.add(task.kept(layer, x[point]))
            _tick(task.shard.windows, ticked)


def _inputs(layer: LayerPass, task: _Observation) -> dict[str, torch.Tensor]:
    return inputs(layer, task.shard, task.points)


@torch.inference_mode()
def _add(layer: LayerPass, task: _Addition) -> None:
    for x in task.inputs:
        task.observer.add(task.start, moment_block(x, task.start))


def _advance(layer: LayerPass, task: _Step) -> tuple[Carried | None, dict[str, np.ndarray]]:
    maxima: dict[str, torch.Tensor] = {}
    carried = advance(layer, task.shard, task.target, maxima if task.cache else None)
    return carried, {part: largest.numpy() for part, largest in maxima.items()}


@torch.inference_mode()
def _moments(layer: LayerPass, task: _Observation) -> Path | list[np.ndarray]:
    """Sums of a shard as blocks, then the tokens that are kept, of one point after another: in a file, or returned."""
    seen = inputs(layer, task.shard, task.points)

    def blocks() -> Iterator[np.ndarray]:
        for point in task.points:
            x = seen[point]
            yield from (moment_block(x, start).numpy() for start in range(0, x.shape[1], MOMENT_BLOCK))
            if task.tokens is not None:
                yield task.kept(layer, x).numpy()

    if task.file is None:
        return list(blocks())
    try:
        with open(task.file, "wb") as file:
            for block in blocks():
                np.save(file, block)
    except OSError as error:
        raise CalibrationError(
            f"no room for the moments of a shard: {error.strerror or error}",
            where=str(task.file),
            expected=f"{sum(2 * x.shape[1] ** 2 for x in seen.values()) / 1e6:.0f} MB free for each process",
            next_step="make room there, or set workspace.workers: 1, which needs none (the results are the same)",
        ) from error
    return task.file


def _read(file: Path) -> Iterator[np.ndarray]:
    """The blocks that `_moments` wrote."""
    with open(file, "rb") as opened:
        while opened.peek(1):
            yield np.load(opened, allow_pickle=False)
