"""A child of `Processes`: computes shards until the parent has no more of them. See gemma_deploy.child.serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gemma_deploy.calibration.shards import LayerPass, LayerSetting, Work, stack_of
from gemma_deploy.child import serve


@dataclass(frozen=True)
class Task:
    """A shard's work.

    Args:
        work: what to do with the layer and `item`.
        model, index: the layer; file: its weights, which are read when it is another file than the last.
    """

    work: Work
    model: LayerSetting
    index: int
    file: Path
    item: Any


class Shards:
    """Does tasks, and keeps the layer of the last one."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._layer: LayerPass | None = None

    def __call__(self, task: Task) -> Any:
        """What `task.work` gives."""
        if self._layer is None or self._file != task.file:
            self._layer = None
            with safe_open(task.file, framework="pt") as opened:
                # Copied: a mapped file would be read again and again when memory is short.
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            self._file, self._layer = task.file, LayerPass.restored(stack_of(task.model), task.index, tensors)
        with self._layer.hooked():
            return task.work(self._layer, task.item)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Shards())
