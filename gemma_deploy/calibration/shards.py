"""One decoder layer's work on a shard of the windows: what every worker does, wherever it runs.

A shard is a fixed number of windows, whatever the number of workers, and is computed by one thread of torch: where
several share an elementwise kernel, the ends of their parts are rounded in another way (GELU of 3 threads: 1e-7), so
that bits would depend on the number of threads. Shards are added in their order. So any number of workers gives the
same bits.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.calibration.layer_weights import refuse_nonfinite, template_stack
from gemma_deploy.calibration.points import CACHED, LAYER_OUTPUT, SHARD_TOKENS, cache_columns
from gemma_deploy.calibration.segments import ENTERED, NOTHING, Beside, Route, state_columns
from gemma_deploy.calibration.states import joined, parts_of
from gemma_deploy.calibration.streams import walk
from gemma_deploy.checkpoint import ModelConfig


def shards_of(nsamples: int, seqlen: int) -> list[range]:
    """Windows [0, nsamples) in runs of about SHARD_TOKENS tokens, at least one window each."""
    size = max(1, SHARD_TOKENS // seqlen)
    return [range(start, min(start + size, nsamples)) for start in range(0, nsamples, size)]


class Readable(Protocol):
    """An array for each window."""

    def read(self, window: int) -> np.ndarray:
        """That of one window, float32 [seqlen, columns]."""


class StateStore(Readable, Protocol):
    """Hidden states [nsamples, seqlen, hidden], or some of them: a `HiddenStates`, or a `StatesByValue` shard."""

    def write(self, window: int, *parts: np.ndarray) -> None:
        """parts: [seqlen, columns] each, one behind the other."""


class StatesByValue:
    """Hidden states of some windows by value, for workers that do not see our disk.

    Args:
        windows: which ones; values: [len(windows), seqlen, hidden].
    """

    def __init__(self, windows: range, values: np.ndarray) -> None:
        self.windows, self.values = windows, values

    @classmethod
    def of(cls, source: Readable, windows: range) -> StatesByValue:
        """Copy the states of some windows out of a store."""
        return cls(windows, np.stack([source.read(window) for window in windows]))

    def read(self, window: int) -> np.ndarray:
        """[seqlen, hidden], a copy."""
        return self.values[window - self.windows.start].copy()

    def write(self, window: int, *parts: np.ndarray) -> None:
        """See `HiddenStates.write`."""
        self.values[window - self.windows.start] = joined(parts)

    def into(self, target: StateStore) -> None:
        """Write these states into a store."""
        for window in self.windows:
            target.write(window, self.read(window))


@dataclass(frozen=True)
class Shard:
    """Windows, and where they are read; what the layer reads of them besides (beside.py)."""

    windows: range
    states: Readable
    vectors: Readable | None = None
    shared: Readable | None = None

    def beside(self, window: int, layer: LayerSpec) -> Beside:
        """What a layer reads of a window beside hidden states."""
        vectors = None if self.vectors is None else torch.from_numpy(self.vectors.read(window))[None]
        if self.shared is None:
            return Beside(vectors)
        heads, size = layer.kv_heads, layer.head_dim
        key, value = (
            torch.from_numpy(part).view(1, -1, heads, size).transpose(1, 2)
            for part in parts_of(self.shared.read(window), heads * size)
        )
        return Beside(vectors, (key, value))


@dataclass(frozen=True)
class LayerSetting:
    """What decides how a layer runs, its weights apart.

    Args:
        embed_scale: "exact" or "bf16", as in the recipe; seqlen: tokens in a window.
        path: of the checkpoint, for messages.
    """

    config: ModelConfig
    embed_scale: str
    seqlen: int
    path: Path


class StackTemplate:
    """The patched stack without weights, its masks and its rotary tables: made once per process."""

    def __init__(self, model: LayerSetting) -> None:
        self.model = model
        self.stack, self.templates = template_stack(model.config, model.embed_scale)
        position_ids = torch.arange(model.seqlen)[None]
        sample = torch.zeros(1, model.seqlen, model.config.hidden_size)
        self.masks = self.stack.build_masks(None, position_ids, 1, model.seqlen, None, torch.float32, sample.device)
        self.rotary = {kind: module(sample, position_ids) for kind, module in self.stack.rotary.items()}

    def layer(self, index: int) -> nn.Module:
        """The module of a layer's template; `loaded` gives it weights."""
        module: nn.Module = self.stack.layers[self.templates.index(self.model.config.layers[index].template)]
        return module


class _SeenError(Exception):
    """Ends a forward pass when everything asked for was observed."""


class LayerPass:
    """A layer with its weights, ready for windows; several threads may use it at once.

    Args:
        stack_template: of the model; index: which layer; `stack_template.layer(index)` holds its weights.
    """

    def __init__(self, stack_template: StackTemplate, index: int) -> None:
        self.stack_template, self.index, self.module = stack_template, index, stack_template.layer(index)
        self.name, self.path = f"model.layers.{index}", stack_template.model.path
        self.spec = stack_template.model.config.layers[index]
        self._watching = threading.local()

    @contextmanager
    def hooked(self) -> Iterator[LayerPass]:
        """Let `run` see the inputs of the linears for the time of the block."""

        def show(point: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                seen = getattr(self._watching, "seen", None)
                if seen is not None:
                    seen(point, args[0])

            return hook

        points = [group.observed for group in self.spec.groups]
        handles = [self.module.get_submodule(point).register_forward_pre_hook(show(point)) for point in points]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def run(
        self,
        hidden: np.ndarray,
        seen: Callable[[str, torch.Tensor], None] | None = None,
        cached: Callable[[str, torch.Tensor], None] | None = None,
        *,
        beside: Beside = NOTHING,
    ) -> torch.Tensor:
        """A window through the layer.

        Args:
            hidden: [seqlen, carried]; seen: called with (linear, its input [1, seqlen, channels]).
            cached: called with ("key" or "value", what the cache would hold [1, Hk, seqlen, D]).
            beside: what the layer reads of the window besides.

        Returns:
            [1, seqlen, carried].
        """
        self._watching.seen = seen
        x = torch.from_numpy(hidden)[None]
        if self.spec.altup is not None:
            x = x.unflatten(-1, (self.spec.altup.streams, -1))
        try:
            output: torch.Tensor
            output, _, present = self.module(x, *self.attention_inputs(), **beside.arguments)
        finally:
            self._watching.seen = None
        if cached is not None and self.spec.cache_from is None:
            for (part, _), value in zip(self.spec.caches, present, strict=True):
                cached(part, value)
        return output.flatten(2)

    def attention_inputs(self) -> tuple[Any, Any]:
        """Rotary embedding and mask, as the layer and its attention take them."""
        return self.stack_template.rotary[self.spec.kind], self.stack_template.masks[self.spec.kind]

    def read_at(self, point: str, module: nn.Module, *args: Any) -> torch.Tensor:
        """What a linear inside `module` reads when that is called; it gets no further."""
        found: list[torch.Tensor] = []

        def seen(name: str, x: torch.Tensor) -> None:
            if name == point:
                found.append(x)
                raise _SeenError

        self._watching.seen = seen
        try:
            module(*args)
        except _SeenError as reached:
            traceback.clear_frames(reached.__traceback__)  # they hold activations in cycles: gigabytes in wide layers
        finally:
            self._watching.seen = None
        return found.pop()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name within the layer, for `restored`."""
        return {name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}

    @classmethod
    def restored(cls, stack_template: StackTemplate, index: int, tensors: dict[str, torch.Tensor]) -> LayerPass:
        """The same pass in another process."""
        stack_template.layer(index).load_state_dict(tensors, strict=True, assign=True)
        return cls(stack_template, index)


@torch.inference_mode()
def inputs(
    layer: LayerPass, shard: Shard, points: Sequence[str], *, route: Route = ENTERED, target: StateStore | None = None
) -> dict[str, torch.Tensor]:
    """Inputs of some linears over a shard: [tokens, channels] each.

    Args:
        points: in the order in which they are reached; the pass ends at the last one.
        route: where the windows are; target: gets what they are at the last point, see segments.py.
    """
    seqlen, found = layer.stack_template.model.seqlen, {}
    for at, window in enumerate(shard.windows):

        def seen(point: str, x: torch.Tensor, at: int = at) -> None:
            if point in points:
                if point not in found:
                    found[point] = torch.empty(len(shard.windows) * seqlen, x.shape[-1])
                found[point][at * seqlen : (at + 1) * seqlen] = x[0]

        beside = shard.beside(window, layer.spec)
        parts = walk(layer, shard.states.read(window), route, stop=points[-1], seen=seen, beside=beside)
        if target is not None:
            target.write(window, *(part[0].numpy() for part in parts))
    return found


@torch.inference_mode()
def advance(
    layer: LayerPass,
    shard: Shard,
    target: StateStore,
    *,
    route: Route,
    maxima: dict[str, torch.Tensor] | None = None,
    kept: StateStore | None = None,
) -> None:
    """Write what the layer gives for a shard into `target`.

    Args:
        route: where the windows are.
        maxima: gets the largest magnitudes [Hk, D] of what the cache would hold, by part; from the layer's input only.
        kept: gets keys and values themselves; from the layer's input only.

    Raises:
        CalibrationError: NaN or infinity.
    """
    present: dict[str, torch.Tensor] = {}
    for window in shard.windows:
        state, beside = shard.states.read(window), shard.beside(window, layer.spec)
        if maxima is not None or kept is not None:
            assert route == ENTERED
            hidden = layer.run(state, cached=present.__setitem__, beside=beside)
        else:
            (hidden,) = walk(layer, state, route, stop=None, seen=lambda point, x: None, beside=beside)
        refuse_nonfinite(hidden, layer.path, layer.name, window=window)
        if kept is not None:
            kept.write(window, *cache_rows(present))
        if maxima is not None:
            for part, value in present.items():
                largest = value[0].abs().amax(1)
                maxima[part] = torch.maximum(maxima[part], largest) if part in maxima else largest
        target.write(window, hidden[0].numpy())


def cache_rows(present: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [1, Hk, seqlen, D] as a store of them has them, [seqlen, Hk * D] each."""
    key, value = (present[part][0].transpose(0, 1).flatten(1).numpy() for part in ("key", "value"))
    return key, value


def empty_states(layer: LayerPass, windows: range, point: str = LAYER_OUTPUT) -> StatesByValue:
    """Room for the windows of a shard at a point, or as the layer gives them; for keys and values at `CACHED`."""
    model = layer.stack_template.model
    columns = cache_columns(layer.spec) if point == CACHED else state_columns(layer.spec, point)
    return StatesByValue(windows, np.empty((len(windows), model.seqlen, columns), np.float32))


def description(layer: LayerPass) -> tuple[LayerSetting, int]:
    """All of a pass but its weights."""
    return layer.stack_template.model, layer.index


_stack_template: StackTemplate | None = None


def stack_of(model: LayerSetting) -> StackTemplate:
    """In a worker: the stack template of its last layer when the model is still the same."""
    global _stack_template
    if _stack_template is None or _stack_template.model != model:
        _stack_template = StackTemplate(model)
    return _stack_template


Work = Callable[[LayerPass, Any], Any]
