"""eval.json of an artifact, when another result is added to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy
from tests.fuzz.surfaces.tokenizer_json import replace

EVAL = "eval.json"


@dataclass
class State:
    sound: Path
    artifact: Path
    results: dict[str, Any]
    new: dict[str, Any]


def prepare(inputs: Inputs, folder: Path) -> State:
    sound = copy(inputs.artifact("static"), folder / "sound")
    run("eval", sound, "--task", "ppl", "--against", "none", "--windows", "1", "--seqlen", "8")
    run("eval", sound, "--task", "ceval", "--against", "none", "--limit", "1", "--shots", "0")
    results = json.loads((sound / EVAL).read_text())
    new = next(one for one in results["results"] if one["task"] == "ppl")
    return State(sound, folder / "artifact", results, new | {"settings": new["settings"] | {"seqlen": 9}})


def attempt(state: State, random: Random) -> None:
    from gemma_deploy.errors import DeployError
    from gemma_deploy.evaluation.record import record

    copy(state.sound, state.artifact)
    replace(state.artifact, EVAL, mutate.json_file(state.results, random))
    try:
        record(state.artifact, state.new)
    except DeployError:
        return
    run("verify", state.artifact)


SURFACE = Surface("evaluation", prepare, attempt)
