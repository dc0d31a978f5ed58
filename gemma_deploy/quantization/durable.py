"""Files of results: on disk in full before they have their names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RECORD = "record"


def durable_tensors(file: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Write a file of tensors and a record, whole or not at all."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with durable(file) as partial:
        save_file(contiguous, partial, {RECORD: json.dumps(record)})


@contextmanager
def durable(file: Path) -> Iterator[Path]:
    """A temporary name beside `file` to write under; the content is on disk before it gets its own."""
    partial = file.with_name(file.name + ".partial")
    yield partial
    with open(partial, "rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, file)
