"""What a streaming pass is made of: embedded windows, a layer's template, its weights for a while, and a check.

Third step of calibration. The passes themselves are in ranges.py and quantization/moments_pass.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import ModelConfig, WeightSource
from gemma_deploy.errors import CalibrationError
from gemma_deploy.machine import one_torch_thread
from gemma_deploy.names import EMBEDDING_WEIGHT, NORM, STREAM_PROJECTION, STREAM_UNEMBED
from gemma_deploy.patched import one_layer_of_each_template, patched_stack


def template_stack(config: ModelConfig, embed_scale: str) -> tuple[Any, tuple[str, ...]]:
    """The patched stack on the meta device with one layer of each template, and their names in that order."""
    changes = one_layer_of_each_template(config)
    if config.per_layer is not None:
        changes["per_layer_vectors"] = config.num_hidden_layers
    stack = patched_stack(config, **changes, embed_scale=embed_scale, iter_num=None)
    return stack, tuple(layer.template for layer in config.templates)


def embed(checkpoint: WeightSource, ids: np.ndarray, stack: Any, *, states: HiddenStates) -> None:
    """Fill `states` with what the first layer reads: scaled embedding rows, or the streams that are made of them.

    Only the rows that occur are read.

    Args:
        stack: of the patched model, on the meta device.
    """
    config, columns = checkpoint.config, checkpoint.embedding_scale()
    scale = torch.tensor(float(stack.embed_tokens.scale_value(torch.float32)))
    scale = scale if columns is None else torch.from_numpy(columns)
    streams = config.altup is not None
    with (
        one_torch_thread() if streams else nullcontext(),
        loaded(stack.altup_projections, checkpoint, STREAM_PROJECTION) if streams else nullcontext(),
    ):
        for window, tokens in enumerate(ids):
            unique, inverse = np.unique(tokens, return_inverse=True)
            hidden = torch.from_numpy(rows_of(checkpoint, EMBEDDING_WEIGHT, unique))[torch.from_numpy(inverse)] * scale
            refuse_nonfinite(hidden, checkpoint.path, EMBEDDING_WEIGHT.removesuffix(".weight"), window=window)
            if streams:
                hidden = stack.entered(hidden[None])[0].flatten(1)
                refuse_nonfinite(hidden, checkpoint.path, STREAM_PROJECTION, window=window)
            states.write(window, hidden.numpy())


@contextmanager
def head_input(checkpoint: WeightSource, stack: Any) -> Iterator[Callable[[np.ndarray], torch.Tensor]]:
    """What makes the LM head's input [1, seqlen, hidden] of the last layer's output [seqlen, carried].

    Args:
        stack: of the patched model, on the meta device; it has the weights for the time of the block.
    """
    altup = checkpoint.config.altup

    def made(state: np.ndarray) -> torch.Tensor:
        hidden = torch.from_numpy(state)[None]
        normed: torch.Tensor = stack.norm(
            hidden if altup is None else stack.left(hidden.unflatten(-1, (altup.streams, -1)))
        )
        return normed

    with (
        loaded(stack.norm, checkpoint, NORM),
        nullcontext() if altup is None else loaded(stack.altup_unembed_projections, checkpoint, STREAM_UNEMBED),
    ):
        yield made


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
