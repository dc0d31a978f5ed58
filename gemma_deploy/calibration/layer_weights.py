"""What a streaming pass is made of: embedded windows, a layer's template, its weights for a while, and a check.

Third step of calibration. The passes themselves are in ranges.py and quantization/moments_pass.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import ModelConfig, WeightSource
from gemma_deploy.errors import CalibrationError
from gemma_deploy.names import EMBEDDING_WEIGHT
from gemma_deploy.patched import one_layer_of_each_template, patched_stack


def template_stack(config: ModelConfig, embed_scale: str) -> tuple[Any, tuple[str, ...]]:
    """The patched stack on the meta device with one layer of each template, and their names in that order."""
    changes = one_layer_of_each_template(config)
    if config.per_layer is not None:
        changes["per_layer_vectors"] = config.num_hidden_layers
    stack = patched_stack(config, **changes, embed_scale=embed_scale, iter_num=None)
    return stack, tuple(layer.template for layer in config.templates)


def embed(checkpoint: WeightSource, ids: np.ndarray, scale: float, *, states: HiddenStates) -> None:
    """Fill `states` with scaled embedding rows, reading only the rows that occur."""
    for window, tokens in enumerate(ids):
        unique, inverse = np.unique(tokens, return_inverse=True)
        hidden = torch.from_numpy(rows_of(checkpoint, EMBEDDING_WEIGHT, unique))[torch.from_numpy(inverse)] * scale
        refuse_nonfinite(hidden, checkpoint.path, EMBEDDING_WEIGHT.removesuffix(".weight"), window=window)
        states.write(window, hidden.numpy())


def rows_of(checkpoint: WeightSource, table: str, tokens: np.ndarray) -> np.ndarray:
    """Rows of a table for some tokens, [tokens, columns] float32."""
    return np.concatenate([checkpoint.rows(table, int(token), int(token) + 1) for token in tokens])


@contextmanager
def loaded(module: nn.Module, checkpoint: WeightSource, name: str) -> Iterator[None]:
    """Give a meta module the weights of `name` for the time of the block, and none after it."""
    try:
        for suffix, own in list(module.state_dict().items()):
            tensor = f"{name}.{suffix}"
            value = torch.from_numpy(checkpoint.rows(tensor, 0, checkpoint.tensors[tensor].shape[0])).reshape(own.shape)
            module.load_state_dict({suffix: value}, strict=False, assign=True)
            del value
        yield
    finally:
        module.to("meta")


def refuse_nonfinite(hidden: torch.Tensor, path: Path, module: str, *, window: int) -> None:
    """Refuse a hidden state that is no number.

    Args:
        path: of the checkpoint; module: that gave it.

    Raises:
        CalibrationError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(hidden).all()):
        raise CalibrationError(
            f"gives NaN or infinity in window {window}",
            where=module,
            expected="finite activations in float32",
            next_step=f"its weights in {path} are damaged: copy or download them again",
        )
