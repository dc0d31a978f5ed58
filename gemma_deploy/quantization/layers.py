"""The streaming quantizer: layer by layer, each one calibrated on what the quantized layers before it give.

Like calibration/layer_weights.py, but what is seen is used at once: the inputs of a group of linears are observed, its
weights solved and replaced, and the next group sees the result (`true_sequential`). One layer's weights and the moments
of one group are in memory; hidden states lie on disk, and pass in shards (moments_pass.py). A layer's result is durable
before the next begins, so a killed run continues at the layer where it stopped, with the same bytes.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gemma_deploy.architectures import InputGroup, LayerSpec
from gemma_deploy.calibration.beside import ReadBeside, shared_file
from gemma_deploy.calibration.executors import Executor, Here
from gemma_deploy.calibration.layer_weights import embed, loaded
from gemma_deploy.calibration.points import TOKENS, cache_columns
from gemma_deploy.calibration.shards import LayerPass, LayerSetting, StackTemplate
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.errors import CalibrationError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.names import COLUMN_FACTOR
from gemma_deploy.progress import Tick
from gemma_deploy.quantization.cache import cache_factors
from gemma_deploy.quantization.experts import Walked, quantize_experts
from gemma_deploy.quantization.experts import passes as expert_passes
from gemma_deploy.quantization.folding import shared_rows
from gemma_deploy.quantization.layer_walk import LayerWalk
from gemma_deploy.quantization.moments import NotPositiveError
from gemma_deploy.quantization.moments_pass import scratch_of
from gemma_deploy.quantization.results import claim, layer_file, read_record, resume_at, states_file, write_result
from gemma_deploy.quantization.scales import as_dtype
from gemma_deploy.quantization.solver import QuantizedWeight, Settings, Solved, solve


@torch.inference_mode()
def quantize_layers(
    checkpoint: WeightSource,
    ids: np.ndarray,
    settings: Settings,
    *,
    folder: Path,
    key: str,
    true_sequential: bool = True,
    int8_cache: bool = False,
    embed_scale: str = "exact",
    progress: Tick | None = None,
    executor: Executor | None = None,
) -> list[dict[str, Any]]:
    """Quantize every decoder layer in float32 arithmetic.

    Args:
        checkpoint: whose weights; one layer is read at a time.
        ids: [nsamples, seqlen] token ids, BOS first.
        settings: of the solver.
        folder: gets one file per layer: int8 `NAME.weight`, float32 `NAME.scale` [rows, groups], and the norm weights
            that absorbed factors; and, while it works, the hidden states.
        key: everything the result depends on; results of another key are thrown away.
        true_sequential: let linears see what the quantized ones before them in the same layer give.
        int8_cache: look at keys and values, and write the factors of their channels (cache.py).
        embed_scale: "exact" or "bf16", as in the recipe.
        progress: called with (windows passed through a layer, all of them), each layer several times.
        executor: where windows pass through layers, threads of this process when None. The bytes are the same.

    Returns:
        One record per layer: its tensors with signal and losses, its groups with damping and dead channels.

    Raises:
        CalibrationError: the weights give NaN or infinity, the disk is full, or a worker ended.
        NotBuiltError: there is no patched model for this generation.
    """
    config = checkpoint.config
    count, (nsamples, seqlen) = config.num_hidden_layers, ids.shape
    shape = (nsamples, seqlen, config.carried)
    claim(folder, key)
    shutil.rmtree(scratch_of(folder), ignore_errors=True)  # of a killed run
    shared = {
        layer.index: (shared_file(folder, layer.index), HiddenStates.bytes_of((nsamples, seqlen, cache_columns(layer))))
        for layer in config.cache_sources
    }
    done = resume_at(folder, count, HiddenStates.bytes_of(shape), shared=shared)
    if done < count:
        executor = executor or Here()
        stack_template = StackTemplate(LayerSetting(config, embed_scale, seqlen, checkpoint.path))
        if done == 0:
            states = HiddenStates(shape, states_file(folder, 0), 0)
            embed(checkpoint, ids, stack_template.stack, states=states)
        else:
            states = HiddenStates(shape, states_file(folder, done), 0, there=True)
        beside = ReadBeside(config, folder, ids.shape, there=done)
        beside.make_vectors(checkpoint, stack_template.stack, ids)
        first = config.layers[0]
        passes = (len(first.groups) if true_sequential else 1) + 1 + expert_passes(first.experts, config.hidden_size)
        for index in range(done, count):
            layer = LayerPass(stack_template, index)
            with loaded(layer.module, checkpoint, layer.name):
                ticked = _Ticks(progress, index * passes * nsamples, count * passes * nsamples)
                keep = TOKENS if settings.activations else 0
                inside = LayerWalk(
                    executor, layer, states, beside=beside, ticked=ticked, tokens=keep, stops=true_sequential
                )
                try:
                    tensors, record = _quantize_layer(
                        layer.module, layer.spec, config.architecture.norm_offset, inside, settings, true_sequential
                    )
                except NotPositiveError as error:
                    raise CalibrationError(
                        "what its linears read has no usable second moments, whatever the damping",
                        where=layer.name,
                        expected="finite activations in float32",
                        next_step=f"its weights in {checkpoint.path} are damaged: copy or download them again",
                    ) from error
                following = HiddenStates(shape, states_file(folder, index + 1), 0)
                factors = cache_factors(layer.spec, inside.leave(following, int8_cache))
            following.sync()
            if (kept := beside.kept(layer.spec)) is not None:
                kept.sync()
            named = {f"{layer.name}.{suffix}": tensor for suffix, tensor in tensors.items()} | factors
            write_result(layer_file(folder, index), named, {"layer": layer.name, **record})
            states.close()
            states = following
            del tensors, named, factors
            give_memory_back()
        shutil.rmtree(scratch_of(folder), ignore_errors=True)
    ReadBeside(config, folder, ids.shape, there=count).close()  # of this run, or of one that was killed
    records = [read_record(layer_file(folder, layer)) for layer in range(count)]
    return [record for record in records if record is not None]


def hidden_states(checkpoint: WeightSource, shape: tuple[int, int], folder: Path) -> HiddenStates:
    """What the last quantized layer gave; `close` deletes it."""
    config = checkpoint.config
    file = states_file(folder, config.num_hidden_layers)
    return HiddenStates((*shape, config.carried), file, 0, there=True)


class _Ticks:
    """Counts windows for the progress."""

    def __init__(self, progress: Tick | None, done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total

    def __call__(self) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total)


def _quantize_layer(
    layer: nn.Module,
    spec: LayerSpec,
    norm_offset: float,
    inside: LayerWalk,
    settings: Settings,
    true_sequential: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Replace the layer's weights by quantized ones.

    Returns:
        What to store, by name within the layer; the record.
    """
    solved: dict[str, QuantizedWeight] = {}
    norms: dict[str, torch.Tensor] = {}
    factors: dict[str, torch.Tensor] = {}
    record: dict[str, Any] = {"groups": {}, "tensors": {}}
    for batch in [[group] for group in spec.groups] if true_sequential else [list(spec.groups)]:
        observers = inside.observe([group.observed for group in batch])
        for group in batch:
            modules = [layer.get_submodule(reader) for reader in group.readers]
            weights = [module.weight.data for module in modules]
            seen = observers.pop(group.observed)
            tokens = seen.tokens.take() if seen.tokens else None
            own = [settings.linear(reader) for reader in group.readers]
            # Where nothing in front can absorb factors, there are none.
            how = settings if group.norm or group.maker else replace(settings, equalize=False)
            # A factor of rows goes into scales that have a type already: of a power of two they stay numbers of it.
            how = replace(how, powers_of_two=bool(group.maker) and settings.scales != "float32")
            found = solve(weights, seen.moments.take(), how, shared=shared_rows(spec, group), tokens=tokens, own=own)
            for reader, module, weight in zip(group.readers, modules, found.weights, strict=True):
                solved[reader] = weight
                module.weight.data = weight.dequantized()
            _fold(layer, group, spec, norm_offset, found, solved, norms, settings.scales)
            if group.maker:
                inside.divided(group.observed, found.factors)
            record["groups"][group.observed] = _describe(found)
            factors[f"{group.observed}.{COLUMN_FACTOR}"] = found.factors.float()
            del weights, found, seen, tokens
        give_memory_back()  # before the next moments: up to a gigabyte of freed blocks in a layer of gemma-2b
    for reader, weight in solved.items():
        record["tensors"][reader] = {
            "signal": weight.signal,
            "loss": weight.loss,
            "rtn_loss": weight.rtn_loss,
            "rows_to_nearest": weight.rows_to_nearest,
        }
        if settings.activations:
            record["tensors"][reader]["activation_noise"] = weight.activation_noise
    tensors = {f"{norm}.weight": value for norm, value in norms.items()} | factors
    for reader, weight in solved.items():
        scale = weight.scale if settings.groupsize else weight.scale[:, 0]
        tensors |= {f"{reader}.weight": weight.codes, f"{reader}.scale": scale}
    if spec.experts is not None:
        walked = Walked(inside.executor, inside.layer, inside.states, inside.route, inside.ticked)
        stacks, figures, record["experts"] = quantize_experts(walked, settings)
        tensors, record["tensors"] = tensors | stacks, record["tensors"] | figures
    return tensors, record


def _fold(
    layer: nn.Module,
    group: InputGroup,
    spec: LayerSpec,
    norm_offset: float,
    found: Solved,
    solved: dict[str, QuantizedWeight],
    norms: dict[str, torch.Tensor],
    scales: str,
) -> None:
    """Divide what makes the input by the factors: a norm's gain, or the scales of rows of the linear before.

    Args:
        norm_offset: what the norm's gain is more than its weight; scales: their type.
    """
    if group.norm:
        weight = layer.get_submodule(group.norm).weight
        weight.data = ((norm_offset + weight.double()) / found.factors.double() - norm_offset).float()
        norms[group.norm] = weight.data.clone()
    elif group.maker:
        shared = shared_rows(spec, group)
        rows = found.factors if shared is None else torch.empty(int(shared.max()) + 1)
        if shared is not None:
            rows[shared] = found.factors
        maker = solved[group.maker]
        solved[group.maker] = replace(maker, scale=as_dtype(maker.scale / rows[:, None], scales))
        layer.get_submodule(group.maker).weight.data = solved[group.maker].dequantized()


def _describe(found: Solved) -> dict[str, Any]:
    return {
        "damping": found.damping,
        "factorizations": found.attempts,
        "dead_channels": found.dead,
        "equalized": found.equalized,
        "largest_factor": float(found.factors.max()),
        "smallest_factor": float(found.factors.min()),
    }
