"""Passes of all windows through a layer, shared out by an executor: what linears read, and the next states.

Shards are added in their order, whoever computed them (calibration/shards.py says why that gives the same bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from gemma_deploy.calibration.beside import ReadBeside
from gemma_deploy.calibration.executors import Executor
from gemma_deploy.calibration.observers import MOMENT_BLOCK, MomentObserver, TokenObserver, moment_block, quick_products
from gemma_deploy.calibration.points import CACHED
from gemma_deploy.calibration.segments import ENTERED, Route
from gemma_deploy.calibration.shards import (
    LayerPass,
    Shard,
    StatesByValue,
    StateStore,
    advance,
    empty_states,
    inputs,
    shards_of,
)
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
    """A shard's task.

    Args:
        points: linears whose inputs to observe; tokens: who picks some of them; route: where the windows are.
        keep: whether what they are at the last point is wanted; target: where that goes, None to return it.
        file: for the moments, None to return them.
    """

    shard: Shard
    points: tuple[str, ...]
    tokens: TokenObserver | None
    route: Route
    keep: bool
    target: StateStore | None
    file: Path | None

    def kept(self, layer: LayerPass, x: torch.Tensor) -> torch.Tensor:
        """The tokens to keep of the shard's [tokens, channels]; none where nobody asked for some."""
        first = self.shard.windows.start * layer.stack_template.model.seqlen
        return x[:0] if self.tokens is None else self.tokens.kept(first, x)


@dataclass(frozen=True)
class _Step:
    """A shard's task.

    Args:
        route: where it is; target: where the next states go, None to return them.
        cache: whether a cache is looked at; keep: whether keys and values are wanted themselves.
        kept: where these go, None to return them.
    """

    shard: Shard
    route: Route
    target: StateStore | None
    cache: bool
    keep: bool = False
    kept: StateStore | None = None


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
    *,
    states: HiddenStates,
    ticked: Callable[[], None],
    tokens: int = 0,
    route: Route = ENTERED,
    following: HiddenStates | None = None,
    beside: ReadBeside | None = None,
) -> dict[str, Observers]:
    """What some linears read, over all windows.

    Args:
        points: linears of the layer, in the order in which they run; the pass ends where the last one is read.
        states: at `route.start`.
        ticked: called once per window.
        tokens: that are kept of each input, at most.
        following: gets the states at the last point.
        beside: what layers read besides, where they do.

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
            _shard(executor, layer, states, shard, beside=beside),
            tuple(points),
            TokenObserver(seen, tokens) if tokens else None,
            route,
            following is not None,
            None if executor.shares == "nothing" else following,
            folder / f"moments-{shard.start}.f32" if executor.shares == "disk" else None,
        )
        for shard in shards
    )
    if executor.shares == "memory":
        _observe_here(executor, layer, tasks, found, ticked)
        return found
    with closing(executor.map(_moments, layer, tasks)) as results:
        for shard, (result, by_value) in zip(shards, results, strict=True):
            if by_value is not None and following is not None:
                by_value.into(following)
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
            del result, blocks, by_value
            _tick(shard, ticked)
    return found


def step(
    executor: Executor,
    layer: LayerPass,
    states: HiddenStates,
    *,
    following: HiddenStates,
    ticked: Callable[[], None],
    cache: bool = False,
    route: Route = ENTERED,
    beside: ReadBeside | None = None,
) -> dict[str, torch.Tensor]:
    """Write what the layer gives for `states` into `following`.

    Args:
        states: at `route.start`; that is the layer's input where later layers read its keys and values.
        cache: look at what a cache would hold, on the way from the layer's input, in float32 throughout.
        beside: what layers read besides, where they do; gets the keys and values that later ones read.

    Returns:
        The largest magnitude of each channel [Hk, D] of "key" and "value"; nothing unless asked for.

    Raises:
        CalibrationError: NaN or infinity, or a worker ended.
    """
    shards = shards_of(*states.shape[:2])
    carried = executor.shares == "nothing"
    kept = None if beside is None else beside.kept(layer.spec)
    tasks = (
        _Step(
            _shard(executor, layer, states, shard, beside=beside),
            route,
            None if carried else following,
            cache,
            kept is not None,
            None if carried else kept,
        )
        for shard in shards
    )
    maxima: dict[str, torch.Tensor] = {}
    with _products(cache), closing(executor.map(_advance, layer, tasks)) as results:
        for shard, (by_value, found, present) in zip(shards, results, strict=True):
            if by_value is not None:
                by_value.into(following)
            if present is not None and kept is not None:
                present.into(kept)
            for part, largest in found.items():
                seen = torch.from_numpy(np.array(largest))
                maxima[part] = torch.maximum(maxima[part], seen) if part in maxima else seen
            _tick(shard, ticked)
    return maxima


def scratch_of(folder: Path) -> Path:
    """Where processes of one machine hand results to each other, beside the hidden states."""
    return folder / FOLDER


def _shard(
    executor: Executor, layer: LayerPass, states: HiddenStates, windows: range, *, beside: ReadBeside | None
) -> Shard:
    if beside is not None:
        return beside.shard(executor, layer.spec, states=states, windows=windows)
    return Shard(windows, StatesByValue.of(states, windows) if executor.shares == "nothing" else states)


def _tick(shard: range, ticked: Callable[[], None]) -> None:
    for _ in shard:
        ticked()


@quick_products()
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
    return inputs(layer, task.shard, task.points, route=task.route, target=task.target)


@torch.inference_mode()
def _add(layer: LayerPass, task: _Addition) -> None:
    for x in task.inputs:
        task.observer.add(task.start, moment_block(x, task.start))


def _products(exact: bool) -> AbstractContextManager[None]:
    return nullcontext() if exact else quick_products()


def _advance(layer: LayerPass, task: _Step) -> tuple[StatesByValue | None, dict[str, np.ndarray], StatesByValue | None]:
    """The next states, the cache's largest magnitudes, keys and values: of what is wanted, what is returned."""
    maxima: dict[str, torch.Tensor] = {}
    by_value = empty_states(layer, task.shard.windows) if task.target is None else None
    present = empty_states(layer, task.shard.windows, CACHED) if task.keep and task.kept is None else None
    with _products(task.cache):
        advance(
            layer,
            task.shard,
            task.target or by_value,
            route=task.route,
            maxima=maxima if task.cache else None,
            kept=task.kept or present,
        )
    return by_value, {part: largest.numpy() for part, largest in maxima.items()}, present


@torch.inference_mode()
@quick_products()
def _moments(layer: LayerPass, task: _Observation) -> tuple[Path | list[np.ndarray], StatesByValue | None]:
    """Sums of a shard as blocks, then the tokens that are kept, of one point after another: in a file, or returned.

    Beside them the states at the last point, where these are returned as well.
    """
    back = task.keep and task.target is None
    by_value = empty_states(layer, task.shard.windows, task.points[-1]) if back else None
    seen = inputs(layer, task.shard, task.points, route=task.route, target=by_value if back else task.target)

    def blocks() -> Iterator[np.ndarray]:
        for point in task.points:
            x = seen[point]
            yield from (moment_block(x, start).numpy() for start in range(0, x.shape[1], MOMENT_BLOCK))
            if task.tokens is not None:
                yield task.kept(layer, x).numpy()

    if task.file is None:
        return list(blocks()), by_value
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
    return task.file, by_value


def _read(file: Path) -> Iterator[np.ndarray]:
    """The blocks that `_moments` wrote."""
    with open(file, "rb") as opened:
        while opened.peek(1):
            yield np.load(opened, allow_pickle=False)
