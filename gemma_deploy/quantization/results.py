"""The quantizer's results on disk, which a run that was killed, or a machine that stopped, leaves for the next one.

key.json is what they all depend on, layer-NNN.safetensors has codes, scales and folded norms of a layer and a record
about them, table.safetensors the factors of the token table, and hidden-NNN.f32 the hidden states in front of a layer,
while they are needed; so are shared-NNN.f32, keys and values of a layer, and vectors.f32 (calibration/beside.py).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gemma_deploy.reading import NotJsonError, open_regular, parse_json
from gemma_deploy.writing import sync, whole_file, write_json

RECORD = "record"
KEY_FILE = "key.json"
KEY_BYTES = 65536
log = logging.getLogger(__name__)


def layer_file(folder: Path, layer: int) -> Path:
    """Where the result of a layer lies."""
    return folder / f"layer-{layer:03d}.safetensors"


def table_file(folder: Path) -> Path:
    """Where the factors of the token table lie."""
    return folder / "table.safetensors"


def states_file(folder: Path, layer: int) -> Path:
    """Where the hidden states in front of a layer lie."""
    return folder / f"hidden-{layer:03d}.f32"


def write_result(file: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Write tensors and a record about them, whole or not at all."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(file) as partial:
        save_file(contiguous, partial, {RECORD: json.dumps(record)})


def read_record(file: Path) -> dict[str, Any] | None:
    """What was written about the tensors in a file; None where there is no such file, or not all of it."""
    try:
        with safe_open(file, framework="pt") as opened:
            record = json.loads((opened.metadata() or {})[RECORD])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def claim(folder: Path, key: str) -> None:
    """Keep the results of this key, delete those of any other."""
    try:
        with open_regular(folder / KEY_FILE) as file:
            known = parse_json(file.read(KEY_BYTES))
    except (OSError, NotJsonError, UnicodeDecodeError):
        known = None
    if known != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / KEY_FILE, key)


def resume_at(
    folder: Path, count: int, states_bytes: int, *, shared: Mapping[int, tuple[Path, int]] | None = None
) -> int:
    """The layer at which to go on, `count` when all is done; layers from there on have no results any more.

    A layer goes on from hidden states, which are deleted when the next layer's are there. After a power cut they may
    be gone although the layer's result is gone too; then earlier layers are done again, which gives the same bytes.

    Args:
        count: layers of the model.
        states_bytes: of the hidden states of all windows.
        shared: layers whose keys and values later ones read; the file with those of all windows, and its bytes.
    """
    done = next((layer for layer in range(count) if read_record(layer_file(folder, layer)) is None), count)
    if done == count and read_record(table_file(folder)) is not None:
        return count

    def can_go_on(layer: int) -> bool:
        needed = [(states_file(folder, layer), states_bytes)]
        if layer < count:
            needed += [file for source, file in (shared or {}).items() if source < layer]
        return all(_size(file) == size for file, size in needed)

    found = next((layer for layer in range(done, 0, -1) if can_go_on(layer)), 0)
    if found < done:
        log.warning("what layer %d goes on from is gone: layers %d and later are done again", done, found)
    # States of their size need not be whole: only those behind a finished layer are. So none may seem to be finished.
    for file in (*(layer_file(folder, layer) for layer in range(found, count)), table_file(folder)):
        file.unlink(missing_ok=True)
    sync(folder)
    return found


def _size(file: Path) -> int | None:
    try:
        return os.stat(file).st_size
    except OSError:
        return None
