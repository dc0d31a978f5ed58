"""The header of model.safetensors, and its length."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy


@dataclass
class State:
    folder: Path
    header: dict[str, Any]
    data: bytes


def prepare(inputs: Inputs, folder: Path) -> State:
    copy(inputs.checkpoint(), folder / "model")
    raw = (folder / "model" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return State(folder, json.loads(raw[8 : 8 + length]), raw[8 + length :])


def attempt(state: State, random: Random) -> None:
    if random.random() < 0.6:
        header = mutate.json_file(state.header, random)
    else:
        header = mutate.raw_bytes(json.dumps(state.header).encode(), random)
    length = struct.pack("<Q", len(header))
    if random.random() < 0.2:
        length = mutate.raw_bytes(length, random, 1)
    content = length + header + state.data
    if random.random() < 0.1:
        content = content[: random.randrange(len(content))]
    (state.folder / "model" / "model.safetensors").write_bytes(content)
    run("inspect", state.folder / "model", *random.choice(((), ("--params",), ("--json", "--params"))))


SURFACE = Surface("safetensors_header", prepare, attempt)
