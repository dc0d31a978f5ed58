"""An Alpaca file: a list of objects."""

from pathlib import Path
from random import Random

from tests.fuzz import mutate
from tests.fuzz.harness import Surface
from tests.fuzz.inputs import Inputs, copy
from tests.fuzz.surfaces.c4 import WORDS, calibrate


def prepare(inputs: Inputs, folder: Path) -> Path:
    copy(inputs.checkpoint("gemma2"), folder / "model")
    return folder


def attempt(folder: Path, random: Random) -> None:
    entries = [{"instruction": WORDS, "input": random.choice(("", "one")), "output": WORDS + str(i)} for i in range(4)]
    calibrate(folder, "alpaca", mutate.json_file(entries, random))


SURFACE = Surface("alpaca", prepare, attempt)
