"""model.safetensors.index.json of a checkpoint in two files."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.checkpoint.make import write_checkpoint
from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run

NAMES = (
    "",
    ".",
    "..",
    "x" * 300,
    "/etc/passwd",
    "a/../b",
    "model-00001-of-00002.safetensors/",
    "a\0b",
    "\ud83d",
    "loop",
)


@dataclass
class State:
    file: Path
    index: dict[str, Any]


def prepare(inputs: Any, folder: Path) -> State:
    write_checkpoint(folder / "model", shards=2)
    (folder / "model" / "loop").symlink_to("loop")
    file = folder / "model" / "model.safetensors.index.json"
    return State(file, json.loads(file.read_text()))


def attempt(state: State, random: Random) -> None:
    index = state.index
    if random.random() < 0.3:
        names = dict(index["weight_map"])
        names[random.choice(list(names))] = random.choice(NAMES)
        index = index | {"weight_map": names}
    state.file.write_bytes(mutate.json_file(index, random))
    run("inspect", state.file.parent)


SURFACE = Surface("safetensors_index", prepare, attempt)
