"""Factors of an int8 KV cache: a key's or value's channels are divided by them before a token's are rounded together.

Every head and token has a scale of its own, made when it is written. Channels of keys differ by orders of magnitude,
the same ones in every token, which one scale cannot serve (real 270M, keys alone: KL 0.0089 with a scale per token,
0.00035 with factors as well). Scales that are fixed beforehand, one for each channel, cost three times as much (keys
and values 0.0012 instead of 0.0004), since tokens differ too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.calibration.beside import ReadBeside
from gemma_deploy.calibration.executors import Executor
from gemma_deploy.calibration.layer_weights import embed, loaded
from gemma_deploy.calibration.points import cache_factor_names, cache_scale_names
from gemma_deploy.calibration.shards import LayerPass, LayerSetting, StackTemplate
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.progress import Tick
from gemma_deploy.quantization.moments_pass import step
from gemma_deploy.quantization.results import write_result

LARGEST_CODE = 127
SMALLEST = 1e-3  # of the largest channel of a head: what was silent on the calibration text may speak up later


def cache_factors(layer: LayerSpec, maxima: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of a layer, [Hk * D] float32: factors, the logarithms' mean of each head 0, and steps of fixed codes.

    Args:
        maxima: of "key" and "value", the largest magnitude of each channel [Hk, D].
    """
    found, names, steps = {}, cache_factor_names(layer), cache_scale_names(layer)
    for part, largest in maxima.items():
        sizes = largest.double()
        sizes = sizes.maximum(SMALLEST * sizes.amax(1, keepdim=True)).clamp_min(1e-30)
        factors = (sizes.log() - sizes.log().mean(1, keepdim=True)).exp()
        found[names[part]] = factors.float().reshape(-1)
        found[steps[part]] = (sizes / LARGEST_CODE).float().reshape(-1)
    return found


@torch.inference_mode()
def observe_cache(
    checkpoint: WeightSource,
    ids: np.ndarray,
    file: Path,
    *,
    embed_scale: str,
    executor: Executor,
    progress: Tick | None = None,
) -> None:
    """Pass windows through the model in float32 and write all factors into one file; one layer is in memory at a time.

    Args:
        ids: [nsamples, seqlen] token ids, BOS first; file: hidden states lie beside it meanwhile.

    Raises:
        CalibrationError: the weights give NaN or infinity, the disk is full, or a worker ended.
    """
    config, (nsamples, seqlen) = checkpoint.config, ids.shape
    shape = (nsamples, seqlen, config.carried)
    stack_template = StackTemplate(LayerSetting(config, embed_scale, seqlen, checkpoint.path))
    states = HiddenStates(shape, file.with_name("hidden.f32"), 0)
    beside = ReadBeside(config, file.parent, ids.shape)
    tensors: dict[str, torch.Tensor] = {}
    done = 0

    def ticked() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, config.num_hidden_layers * nsamples)

    try:
        embed(checkpoint, ids, stack_template.stack, states=states)
        beside.make_vectors(checkpoint, stack_template.stack, ids)
        for index in range(config.num_hidden_layers):
            layer = LayerPass(stack_template, index)
            with loaded(layer.module, checkpoint, layer.name):
                # A window's states are read before the layer's are written in their place.
                maxima = step(executor, layer, states, following=states, ticked=ticked, cache=True, beside=beside)
            tensors |= cache_factors(layer.spec, maxima)
    finally:
        states.close()
        beside.close()
    write_result(file, tensors, {})
