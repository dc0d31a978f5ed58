"""genai_config.json of an artifact for ONNX Runtime."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface
from tests.fuzz.inputs import Inputs, copy
from tests.fuzz.surfaces.tokenizer_json import generate, replace

FILE = "genai_config.json"


@dataclass
class State:
    artifact: Path
    config: dict[str, Any]


def prepare(inputs: Inputs, folder: Path) -> State:
    artifact = copy(inputs.artifact("genai"), folder / "artifact")
    return State(artifact, json.loads((artifact / FILE).read_text()))


def attempt(state: State, random: Random) -> None:
    replace(state.artifact, FILE, mutate.json_file(state.config, random))
    generate(state.artifact, random)


SURFACE = Surface("genai_config", prepare, attempt)
