"""Which experts tokens are given by two models with one architecture.

A router's choice is a step: where the last expert that is chosen and the first that is left have nearly one score, any
rounding in front of it gives a token another expert, and its logits are others by more than the rounding says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.parity.cases import Case

Choices = dict[str, np.ndarray]  # path of the router -> experts [tokens, chosen], ascending; padding included


class Chooses(Protocol):
    """A source that has run, see `TorchSource`."""

    @property
    def chosen(self) -> Choices:
        """Empty of a model without experts."""


def watch_choices(model: nn.Module, layers: Sequence[LayerSpec], found: Choices) -> None:
    """Note what each router of a decoder stack chooses, of tokens of all rows one after the other."""
    for layer in layers:
        if layer.experts is not None:
            path = f"{layer.prefix}{layer.experts.router}"
            hook = _note(path, layer.experts.chosen, found)
            model.get_submodule(path.removeprefix("model.")).register_forward_hook(hook)


def changed_choices(reference: Chooses, test: Chooses, cases: Sequence[Case]) -> tuple[int, int]:
    """(choices that differ, all of them): one for each token and layer, of both sources after they ran the cases."""
    lengths = np.array([len(case.sequence(row)) for case in cases for row in range(len(case.prompts))])
    real = (np.arange(lengths.max()) < lengths[:, None]).reshape(-1)
    differ = sum(int((test.chosen[path][real] != one[real]).any(1).sum()) for path, one in reference.chosen.items())
    return differ, len(reference.chosen) * int(real.sum())


def note_of(reference: Chooses, test: Chooses, cases: Sequence[Case]) -> list[str]:
    """A sentence about a model with experts, of a source with its codes; none about other models."""
    differ, count = changed_choices(reference, test, cases)
    if not count:
        return []
    return [f"{differ} of {count} choices of experts (tokens times layers) are others with the rounded weights"]


def _note(path: str, chosen: int, found: Choices) -> Any:
    def hook(module: nn.Module, args: Any, scores: torch.Tensor) -> None:
        experts = scores.topk(chosen, dim=-1).indices.sort(dim=-1).values
        found[path] = experts.reshape(-1, chosen).numpy().copy()

    return hook
