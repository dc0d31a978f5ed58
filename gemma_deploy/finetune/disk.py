"""Room on the disk for a training: what stays in OUT, and checkpoints that stand beside it until the end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import PreflightError
from gemma_deploy.finetune.checkpoints import KEPT
from gemma_deploy.finetune.plan import optimizer_bytes, optimizer_of, trained_weights
from gemma_deploy.finetune.settings import FinetuneSettings
from gemma_deploy.machine import Machine, size
from gemma_deploy.workdir import partial_of

RECORD_BYTES = 1 << 20  # report, log, states of random numbers
WORD_BYTES = 128  # of a token in a tokenizer.json: 33 MB for the 262,144 of Gemma 3


@dataclass(frozen=True)
class Saving:
    """What the room depends on.

    Args:
        method: see settings; optim: of SFTConfig.
        steps: in all; every: so many steps there is a checkpoint, and one at the end.
        best: whether the best one is kept beside the newest.
    """

    method: str
    optim: str
    steps: int
    every: int
    best: bool


@dataclass(frozen=True)
class Room:
    """Bytes.

    Args:
        result: what stays; checkpoint: one of the trainer's; checkpoints: how many stand beside each other at most.
        staged: weights written for bitsandbytes: of a .gguf file in float32, of a multimodal model under other names.
    """

    result: int
    checkpoint: int
    checkpoints: int
    staged: int = 0

    @property
    def total(self) -> int:
        """At the end of the training, before checkpoints are deleted."""
        return self.result + self.checkpoint * self.checkpoints + self.staged

    def __str__(self) -> str:
        staged = f", the base for bitsandbytes {size(self.staged)}" if self.staged else ""
        return f"what stays {size(self.result)}, checkpoints {self.checkpoints} x {size(self.checkpoint)}{staged}"


def saving_of(settings: FinetuneSettings, arguments: Any, *, examples: int) -> Saving:
    """Of a run.

    Args:
        arguments: its SFTConfig; examples: how many are trained on.
    """
    steps = arguments.max_steps
    if steps <= 0:  # at most: rows of packed examples are fewer
        rows = math.ceil(examples / (arguments.per_device_train_batch_size * (settings.devices or 1)))
        steps = math.ceil(rows / arguments.gradient_accumulation_steps * arguments.num_train_epochs)
    every = arguments.save_steps
    every = math.ceil(every * steps) if every < 1 else int(every)  # below 1 it is a share of them
    return Saving(settings.method, optimizer_of(arguments), steps, every, settings.patience is not None)


def room(settings: FinetuneSettings, checkpoint: Checkpoint, saving: Saving) -> Room:
    """What a run writes."""
    trained = trained_weights(settings, checkpoint, saving.method)
    files = sum(file.stat().st_size for file in checkpoint.tokenizer_files())
    result = 4 * trained + (files or WORD_BYTES * checkpoint.config.vocab_size) + RECORD_BYTES
    most = KEPT + 1 + saving.best  # a new one is written before an old one is deleted
    count = min(most, math.ceil(saving.steps / saving.every))
    staged = 0
    if saving.method == "qlora" and checkpoint.is_dequantized:
        staged = 4 * trained_weights(settings, checkpoint, "full")
    elif saving.method == "qlora" and checkpoint.is_nested:
        staged = sum(info.nbytes for info in checkpoint.tensors.values())
    return Room(result, result + optimizer_bytes(saving.optim, trained), count, staged)


def smaller(saving: Saving) -> Iterator[tuple[str, Saving]]:
    """Settings that write less, those that change least first."""
    if saving.every < saving.steps:
        saving = replace(saving, every=saving.steps)
        yield f"--set save_steps={saving.steps} (a run that is killed begins again)", saving
    if saving.method == "full":
        yield "--set optim=adafactor", replace(saving, optim="adafactor")
        yield "--method lora", replace(saving, method="lora")


def check_disk(
    settings: FinetuneSettings, checkpoint: Checkpoint, saving: Saving, *, out: Path, machine: Machine
) -> Room:
    """The room that is needed, where it is there; what a stopped run left counts as there.

    Raises:
        PreflightError: it is not: with what it is for, and the first smaller setting that fits.
    """
    needed, free = room(settings, checkpoint, saving), machine.disk_free_bytes
    partial = partial_of(out)
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    if needed.total - there <= free:
        return needed
    advice = "free space, or name an OUT on another disk"
    for words, other in smaller(saving):
        total = room(settings, checkpoint, other).total
        if total - there <= free:
            advice += f"; {words} takes about {size(total)}"
            break
    raise PreflightError(
        f"the training writes about {size(needed.total)}, {size(free)} is free: {needed}",
        where=str(out),
        next_step=advice,
    )
