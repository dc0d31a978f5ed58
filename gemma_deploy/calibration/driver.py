"""The streaming pass: all windows through the patched decoder layers, one layer's weights in memory at a time.

Third step of calibration: checkpoint and windows in, tensors shown to a callback. What is done with them is the
callback's business (see observers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from gemma_deploy.calibration.points import LAYER_INPUTS
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.errors import CalibrationError
from gemma_deploy.patched import stack_classes

Observe = Callable[[str, torch.Tensor], None]
Progress = Callable[[int, int], None]
TABLE = "model.embed_tokens.weight"


@torch.inference_mode()
def run_layers(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    observe: Observe,
    *,
    scratch: Path,
    embed_scale: str = "exact",
    progress: Progress | None = None,
) -> None:
    """Run every window through every layer in float32.

    Windows go one at a time, so that the numbers do not depend on how many there are.

    Args:
        checkpoint: whose weights; only its rows are read.
        ids: [nsamples, seqlen] token ids.
        observe: called with (point, [1, seqlen, channels]); points are `MODULE.in` and `MODULE.out`, see points.py.
        scratch: directory for the hidden states when they do not fit in memory.
        embed_scale: "exact" or "bf16", as in the recipe.
        progress: called with (windows passed through layers, all of them).

    Raises:
        CalibrationError: the table, a layer or the norm gives NaN or infinity, or the disk is full.
        NotBuiltError: there is no patched model for this generation.
    """
    stack, kinds = template_stack(checkpoint.config, embed_scale)
    nsamples, seqlen = ids.shape
    position_ids = torch.arange(seqlen)[None]
    states = HiddenStates((nsamples, seqlen, checkpoint.config.hidden_size), scratch / "hidden_states.f32")
    with closing(states):
        embed(checkpoint, ids, float(stack.embed_tokens.scale_value(torch.float32)), states)
        hidden = torch.from_numpy(states.read(0))[None]
        masks = stack.build_masks(None, position_ids, 1, seqlen, None, torch.float32, hidden.device)
        rotary = {kind: module(hidden, position_ids) for kind, module in stack.rotary.items()}
        layer_count = len(checkpoint.config.layer_types)
        for index, kind in enumerate(checkpoint.config.layer_types):
            layer, name = stack.layers[kinds.index(kind)], f"model.layers.{index}"
            with loaded(layer, checkpoint, name), watched(layer, name, observe):
                for window in range(nsamples):
                    hidden = torch.from_numpy(states.read(window))[None]
                    hidden = layer(hidden, position_embeddings=rotary[kind], attention_mask=masks[kind])[0]
                    refuse_nonfinite(hidden, checkpoint, name, window)
                    observe(f"{name}.out", hidden)
                    states.write(window, hidden[0].numpy())
                    if progress:
                        progress(index * nsamples + window + 1, layer_count * nsamples)
        with loaded(stack.norm, checkpoint, "model.norm"):
            for window in range(nsamples):
                hidden = stack.norm(torch.from_numpy(states.read(window))[None])
                refuse_nonfinite(hidden, checkpoint, "model.norm", window)
                observe("lm_head.in", hidden)


def template_stack(config: ModelConfig, embed_scale: str) -> tuple[Any, tuple[str, ...]]:
    """The patched stack on the meta device with one layer of each kind, and the kinds in the order of its layers."""
    kinds = tuple(dict.fromkeys(config.layer_types))
    config_class, stack_class = stack_classes(config.model_type)
    raw = {key: value for key, value in config.raw.items() if key not in ("auto_map", "layer_types")}
    changes: dict[str, Any] = {"num_hidden_layers": len(kinds), "embed_scale": embed_scale, "iter_num": None}
    if config.model_type != "gemma":
        changes["layer_types"] = list(kinds)
    hf_config = config_class(**raw | changes)
    hf_config._attn_implementation = "eager"
    with torch.device("meta"):
        return stack_class(hf_config).eval(), kinds


def embed(checkpoint: Checkpoint, ids: np.ndarray, scale: float, states: HiddenStates) -> None:
    """Fill `states` with scaled embedding rows, reading only the rows that occur."""
    for window, tokens in enumerate(ids):
        unique, inverse = np.unique(tokens, return_inverse=True)
        rows = np.concatenate([checkpoint.rows(TABLE, int(token), int(token) + 1) for token in unique])
        hidden = torch.from_numpy(rows)[torch.from_numpy(inverse)] * scale
        refuse_nonfinite(hidden, checkpoint, TABLE.removesuffix(".weight"), window)
        states.write(window, hidden.numpy())


@contextmanager
def loaded(module: nn.Module, checkpoint: Checkpoint, name: str) -> Iterator[None]:
    """Give a meta module the weights of `name` for the time of the block, and none after it."""
    try:
        for suffix in list(module.state_dict()):
            tensor = f"{name}.{suffix}"
            value = torch.from_numpy(checkpoint.rows(tensor, 0, checkpoint.tensors[tensor].shape[0]))
            module.load_state_dict({suffix: value}, strict=False, assign=True)
            del value
        yield
    finally:
        module.to("meta")


@contextmanager
def watched(layer: nn.Module, name: str, observe: Observe) -> Iterator[None]:
    """Show `observe` the inputs of the layer's linears for the time of the block."""

    def show(point: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, args: observe(point, args[0])

    handles = [
        layer.get_submodule(linear).register_forward_pre_hook(show(f"{name}.{linear}.in")) for linear in LAYER_INPUTS
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Placed(Protocol):
    """Something read from a checkpoint."""

    @property
    def path(self) -> Path:
        """The checkpoint's."""


def refuse_nonfinite(hidden: torch.Tensor, checkpoint: Placed, module: str, window: int) -> None:
    """Raise CalibrationError where a hidden state is no number."""
    if not bool(torch.isfinite(hidden).all()):
        raise CalibrationError(
            f"gives NaN or infinity in window {window}",
            where=module,
            expected="finite activations in float32",
            next_step=f"its weights in {checkpoint.path} are damaged: copy or download them again",
        )
