"""All windows on their way through one layer whose groups of linears are quantized one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gemma_deploy.calibration.beside import ReadBeside
from gemma_deploy.calibration.executors import Executor
from gemma_deploy.calibration.segments import ENTERED, Route, state_columns
from gemma_deploy.calibration.shards import LayerPass
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.quantization.moments_pass import Observers, observe, scratch_of, step


class LayerWalk:
    """Windows begin at the layer's input and wait at every group that is observed, on disk.

    Args:
        states: in front of the layer; they stay as they are. beside: what layers read besides.
        ticked: called once per window and pass.
        tokens: that are kept of each input, at most.
        stops: whether they wait; else each pass begins at the layer's input.
    """

    def __init__(
        self,
        executor: Executor,
        layer: LayerPass,
        states: HiddenStates,
        *,
        beside: ReadBeside,
        ticked: Callable[[], None],
        tokens: int,
        stops: bool,
    ) -> None:
        self.executor, self.layer, self.first, self.ticked = executor, layer, states, ticked
        self.tokens, self.stops, self.beside = tokens, stops, beside
        self.states, self.route = states, ENTERED

    def observe(self, points: Sequence[str]) -> dict[str, Observers]:
        """What some linears read; windows that wait do so at the last of them."""
        following, last = None, points[-1]
        if self.stops and last != self.layer.spec.groups[0].observed:
            folder = scratch_of(self.first.file.parent)
            folder.mkdir(exist_ok=True)
            columns = state_columns(self.layer.spec, last)
            following = HiddenStates((*self.first.shape[:2], columns), folder / f"{last}.f32", 0)
        found = observe(
            self.executor,
            self.layer,
            points,
            states=self.states,
            ticked=self.ticked,
            tokens=self.tokens,
            route=self.route,
            following=following,
            beside=self.beside,
        )
        if following is not None:
            self._close()
            self.states, self.route = following, Route(last)
        return found

    def divided(self, point: str, factors: torch.Tensor) -> None:
        """Say that what makes the input of a linear was divided by factors [columns] after windows came there."""
        if self.route.start == point:
            self.route = Route(point, factors)

    def leave(self, following: HiddenStates, int8_cache: bool) -> dict[str, torch.Tensor]:
        """Write what the layer gives, and return what `step` does.

        Args:
            int8_cache: look at what the cache would hold, which takes a whole pass from the layer's input; so do keys
                and values that later layers read.
        """
        whole = int8_cache or self.beside.kept(self.layer.spec) is not None
        states, route = (self.first, ENTERED) if whole else (self.states, self.route)
        maxima = step(
            self.executor,
            self.layer,
            states,
            following=following,
            ticked=self.ticked,
            cache=int8_cache,
            route=route,
            beside=self.beside,
        )
        self._close()
        return maxima

    def _close(self) -> None:
        if self.states is not self.first:
            self.states.close()
