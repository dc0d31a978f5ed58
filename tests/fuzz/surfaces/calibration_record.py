"""What an unfinished or finished run left: calibration.json, the journal of parameters, rescaling.json and marks."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, UnexplainedError, run
from tests.fuzz.inputs import Inputs, copy


@dataclass
class State:
    folder: Path
    record: Path
    sound: bytes


def arguments(folder: Path) -> tuple[object, ...]:
    return (
        *("calibrate", "--dataset", "c4", "--checkpoint", folder / "model", "--nsamples", "1", "--seqlen", "8"),
        *("--workspace", folder / "workspace"),
    )


def prepare(inputs: Inputs, folder: Path) -> State:
    copy(inputs.checkpoint("gemma"), folder / "model")
    code, _, said = run(*arguments(folder))
    if code:
        raise UnexplainedError(said)
    (record,) = folder.glob("workspace/calib/*/calibration.json")
    return State(folder, record, record.read_bytes())


def attempt(state: State, random: Random) -> None:
    state.record.write_bytes(mutate.json_file(json.loads(state.sound), random))
    run(*arguments(state.folder))


SURFACE = Surface("calibration_record", prepare, attempt)
