"""split.json of a model that was cut into parts, and a part's config.json and weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, UnexplainedError, run
from tests.fuzz.inputs import Inputs, copy


@dataclass
class State:
    sound: Path
    folder: Path


def prepare(inputs: Inputs, folder: Path) -> State:
    checkpoint = copy(inputs.checkpoint(), folder / "model")
    code, _, said = run("split", checkpoint, folder / "sound", "--points", "2,5")
    if code:
        raise UnexplainedError(said)
    return State(folder / "sound", folder / "parts")


def attempt(state: State, random: Random) -> None:
    from gemma_deploy.errors import DeployError
    from gemma_deploy.split.factory import load_part
    from gemma_deploy.split.layout import read_split

    copy(state.sound, state.folder)
    file = random.choice(sorted([*state.folder.rglob("*.json"), *state.folder.rglob("*.safetensors")]))
    raw = file.read_bytes()
    if file.suffix == ".json":
        file.write_bytes(mutate.json_file(json.loads(raw), random))
    else:
        file.write_bytes(mutate.raw_bytes(raw, random, end=4096))
    try:
        for name in read_split(state.folder):
            load_part(state.folder / name)
    except DeployError:
        return


SURFACE = Surface("parts", prepare, attempt)
