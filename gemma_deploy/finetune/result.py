"""What `finetune` gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_deploy.finetune.disk import Room
from gemma_deploy.finetune.encoding import Examples
from gemma_deploy.finetune.plan import Memory
from gemma_deploy.finetune.training import Outcome


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` made.

    Args:
        path: OUT; adapter: PEFT's directory in it, None after a full training; model: a checkpoint, or None.
        outcome: losses, samples and figures; None where `--dry-run` was asked for.
        base: the artifact whose codes it was trained on, or None.
        memory, room: estimates of memory and disk.
        examples: trained on; held_out: evaluated on, or None.
    """

    path: Path
    adapter: Path | None
    model: Path | None
    base: str | None
    outcome: Outcome | None
    memory: Memory
    room: Room
    examples: Examples
    held_out: Examples | None
