"""Memory of a training, estimated before the model is loaded, and which smaller setting fits where it does not.

Weights, gradients and optimizer states follow from shapes. Activations are counted as the arrays that autograd keeps of
an eagerly attending Gemma layer (`KEPT`); the sum was compared with the peak of LoRA on the real Gemma 3 270M, 4 x 256
tokens in float32 (docs/finetune.md), and with nothing else: of other models and methods it is arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.errors import PreflightError
from gemma_deploy.finetune.model import kept_as_stored, targets_of
from gemma_deploy.finetune.settings import LOGITS_BYTES, FinetuneSettings
from gemma_deploy.machine import Machine, gib
from gemma_deploy.names import EMBEDDING_WEIGHT, HEAD_WEIGHT

# torch, transformers, trl, datasets, a large tokenizer, and what allocators keep: measured on the 270M.
LIBRARIES_BYTES = 1430 << 20
# float32 arrays that a layer keeps for its backward pass: of hidden_size, intermediate_size, all heads, and scores.
KEPT_HIDDEN, KEPT_INNER, KEPT_HEADS, KEPT_SCORES = 16, 6, 8, 3
# Bytes of optimizer states for each trained weight, by the first words of SFTConfig's `optim`; others as AdamW.
STATES = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "adamw_bnb_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1,
          "adafactor": 1, "sgd": 0, "lion": 4, "paged_lion": 4}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What the memory depends on.

    Args:
        method: see settings; batch: examples at a time; length: tokens of the longest; checkpointing: of gradients.
        optim: of SFTConfig; half: whether activations are bfloat16.
    """

    method: str
    batch: int
    length: int
    checkpointing: bool
    optim: str = "adamw_torch"
    half: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    libraries: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {gib(value)}" for name, value in vars(self).items() if value)


def estimate(settings: FinetuneSettings, checkpoint: Checkpoint, shape: Shape) -> Memory:
    """Peak memory of one process."""
    config = checkpoint.config
    sizes = {name: prod(info.shape) for name, info in checkpoint.tensors.items()}
    everything = sum(sizes.values())
    linears = sum(one.in_features * one.out_features for layer in config.layers for one in layer.linears)
    trained = trained_weights(settings, checkpoint, shape.method)
    weights = _weight_bytes(settings.model_copy(update={"method": shape.method}), checkpoint, everything, linears)
    if shape.method != "full":
        weights += 4 * trained
    table = sizes.get(HEAD_WEIGHT, sizes[EMBEDDING_WEIGHT])
    return Memory(
        libraries=LIBRARIES_BYTES,
        weights=weights,
        gradients=4 * trained,
        optimizer=optimizer_bytes(shape.optim, trained),
        activations=_activations(config, shape),
        head=(3 if config.final_logit_softcapping else 2) * LOGITS_BYTES + (4 * table if shape.method == "full" else 0),
    )


def _weight_bytes(settings: FinetuneSettings, checkpoint: Checkpoint, everything: int, linears: int) -> int:
    """Of a base: float32 but for linears in 4 bits or in codes, and a table in the 16 bits of the checkpoint.

    Args:
        everything, linears: numbers of weights.
    """
    if settings.method == "qlora":
        return 4 * (everything - linears) + int(0.53 * linears)
    if settings.base is not None:
        return 4 * (everything - linears) + linears
    return 4 * everything - sum(
        2 * prod(checkpoint.tensors[name].shape) for name in kept_as_stored(settings, checkpoint)
    )


def _activations(config: ModelConfig, shape: Shape) -> int:
    tokens, width = shape.batch * shape.length, 2 if shape.half else 4
    kept = []
    for layer in config.layers:
        row = KEPT_HIDDEN * layer.hidden_size + KEPT_INNER * layer.intermediate_size
        row += KEPT_HEADS * layer.heads * layer.head_dim
        kept.append(width * tokens * row + 4 * KEPT_SCORES * layer.heads * shape.batch * shape.length**2)
    between = width * tokens * config.hidden_size * len(kept)
    return max(kept) + between if shape.checkpointing else sum(kept)


def optimizer_bytes(optim: str, trained: int) -> int:
    """Of the states of an optimizer of SFTConfig, in memory and in a checkpoint."""
    return STATES.get(optim, 8) * trained


def trained_weights(settings: FinetuneSettings, checkpoint: Checkpoint, method: str) -> int:
    """How many numbers are trained: all of the model's, or those of the adapter."""
    if method == "full":
        return sum(prod(info.shape) for info in checkpoint.tensors.values())
    targets = targets_of(settings, checkpoint)
    return sum(
        settings.lora.r * (one.in_features + one.out_features) + settings.lora.dora * one.out_features
        for layer in checkpoint.config.layers
        for one in layer.linears
        if one.kind in targets
    )


def shape_of(settings: FinetuneSettings, arguments: Any, longest: int) -> Shape:
    """Of a run.

    Args:
        arguments: its SFTConfig; longest: tokens of the longest example.
    """
    length = arguments.max_length if arguments.packing else longest
    batch = max(arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size)
    batch = arguments.per_device_train_batch_size if arguments.gradient_checkpointing else batch
    checkpointing, half = bool(arguments.gradient_checkpointing), bool(arguments.bf16)
    return Shape(settings.method, batch, length, checkpointing, optimizer_of(arguments), half)


def optimizer_of(arguments: Any) -> str:
    """The field `optim` of an SFTConfig."""
    return str(getattr(arguments.optim, "value", arguments.optim))


def smaller(shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Settings that take less, those that change least first."""
    if not shape.checkpointing:
        shape = replace(shape, checkpointing=True)
        yield "--set gradient_checkpointing=true", shape
    words = "--set per_device_train_batch_size={} --set gradient_accumulation_steps={}"
    start = shape.batch
    while shape.batch > 1:
        shape = replace(shape, batch=shape.batch // 2)
        yield words.format(shape.batch, start // shape.batch), shape
    if shape.method == "full":
        yield "--set optim=adamw_8bit (needs bitsandbytes)", replace(shape, optim="adamw_8bit")
        shape = replace(shape, method="lora")
        yield "--method lora", shape
    while shape.length > 256:
        shape = replace(shape, length=shape.length // 2)
        yield f"--max-length {shape.length}", shape
    if shape.method == "lora":
        yield "--method qlora", replace(shape, method="qlora")


def check_memory(settings: FinetuneSettings, checkpoint: Checkpoint, shape: Shape, *, machine: Machine) -> Memory:
    """The estimate, where there is room for it.

    Raises:
        PreflightError: there is not: with what it is for, and the first smaller setting that fits.
    """
    needed = estimate(settings, checkpoint, shape)
    if needed.total <= machine.ram_bytes:
        return needed
    advice, words = "use a machine with more memory", []
    for option, other in smaller(shape):
        words.append(option)
        total = estimate(settings, checkpoint, other).total
        if total <= machine.ram_bytes:
            advice = f"{option} takes about {gib(total)}"
            break
    else:
        advice += f"; with {words[-1]} it is {gib(total)} still" if words else ""
    raise PreflightError(
        f"the training needs about {gib(needed.total)} of memory, {gib(machine.ram_bytes)} is available "
        f"({machine.ram_source}): {needed}",
        where=f"finetune, {shape.batch} examples of {shape.length} tokens at a time",
        next_step=advice,
    )
