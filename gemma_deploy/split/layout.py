"""The files of a split model: split.json names the parts, each directory holds config.json and model.safetensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import CONFIG
from gemma_deploy.partition import Span
from gemma_deploy.reading import FileKind, read_object

PART_KEY, WEIGHTS, INDEX = "gemma_deploy_part", "model.safetensors", "split.json"
NAME = r"[A-Za-z0-9_-]{1,64}"  # of a part, which is that of its directory
AGAIN = "make one with `gemma-deploy split CHECKPOINT OUT`"
SPLIT_FILE = FileKind(CheckpointError, "the list of parts that `gemma-deploy split` writes", AGAIN, missing=AGAIN)
PART_FILE = FileKind(
    CheckpointError, f"config.json with {PART_KEY}", "make parts with `gemma-deploy split`, or with save_part"
)


def part_config(config: ModelConfig, span: Span, embed_scale: str = "exact") -> dict[str, Any]:
    """config.json of a part: the whole model's with all its stop tokens, and which part this is."""
    here = {"name": span.name, "start": span.start, "stop": span.stop, "embed_scale": embed_scale}
    return {**config.raw, "eos_token_id": list(config.eos_token_ids), PART_KEY: here}


def read_split(directory: Path) -> list[str]:
    """Names of the parts in a directory that `gemma-deploy split` wrote, in order.

    Raises:
        CheckpointError: it holds no finished split.
    """
    file = directory / INDEX
    parts = read_object(file, SPLIT_FILE).get("parts")
    names = [part.get("name") if isinstance(part, dict) else None for part in parts] if isinstance(parts, list) else []
    if not names or any(not isinstance(name, str) or not re.fullmatch(NAME, name) for name in names):
        raise SPLIT_FILE.wrong("is no split model: parts does not name the directories of the parts", file)
    return [str(name) for name in names]


def read_part(directory: Path) -> tuple[ModelConfig, Span, str]:
    """What a part's config.json says: the whole model's config, the part's layers, and its embedding scale.

    Raises:
        CheckpointError: it is no config of a part.
    """
    file = directory / CONFIG
    raw = read_object(file, PART_FILE)
    here = raw.pop(PART_KEY, None)
    if not isinstance(here, dict):
        raise PART_FILE.wrong(f"is not the config of a part: it has no {PART_KEY}", file)
    config = ModelConfig.from_dict(raw, str(file))
    layers = config.num_hidden_layers
    start, stop = (value if type(value) is int else -1 for value in (here.get("start"), here.get("stop")))
    problems = []
    if not 0 <= start < stop <= layers:
        problems.append(f"start and stop: expected whole numbers from 0 to {layers}, the first one smaller")
    for key, known in (("embed_scale", ("exact", "bf16")), ("name", None)):
        value = here.get(key)
        if not isinstance(value, str) or (known and value not in known):
            problems.append(f"{key}: got {str(value)[:40]!r}, expected {' or '.join(known) if known else 'text'}")
    if problems:
        raise CheckpointError(
            f"{PART_KEY} is wrong",
            where=str(file),
            problems=problems,
            expected=PART_FILE.expected,
            next_step=PART_FILE.next_step,
        )
    return config, Span(here["name"], start, stop, start == 0, stop == layers), here["embed_scale"]
