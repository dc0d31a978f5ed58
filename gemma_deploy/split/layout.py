"""The files of a split model: split.json names the parts, each directory holds config.json and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.errors import CheckpointError
from gemma_deploy.partition import Span

PART_KEY, WEIGHTS, INDEX = "gemma_deploy_part", "model.safetensors", "split.json"


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
    try:
        return [str(part["name"]) for part in json.loads(file.read_text(encoding="utf-8"))["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"no split model: {INDEX} cannot be read ({type(error).__name__})",
            where=str(directory),
            next_step="make one with `gemma-deploy split CHECKPOINT OUT`",
        ) from error
