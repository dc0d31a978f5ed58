"""A C4 file: lines of JSON, gzipped or not."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy

WORDS = "the list holds the names of all files and returns the value " * 4


@dataclass
class State:
    folder: Path


def prepare(inputs: Inputs, folder: Path) -> State:
    copy(inputs.checkpoint("gemma"), folder / "model")
    return State(folder)


def attempt(state: State, random: Random) -> None:
    rows = [{"text": WORDS + str(i), "timestamp": "2019-04-25T12:57:54Z", "url": "http://a"} for i in range(6)]
    rows = [mutate.json_tree(row, random) if random.random() < 0.3 else row for row in rows]
    joint = random.choice((b"\n", b"\n", b"\r\n", b"\n\n", b" ", b"\n" * 1000))
    raw = joint.join(
        mutate.json_text(row, random) if random.random() < 0.3 else json.dumps(row).encode() for row in rows
    )
    if random.random() < 0.5:
        raw = gzip.compress(raw, mtime=0)
    if random.random() < 0.1:
        raw = gzip.compress(
            random.choice((b"\n", b" ", b"\0", b'{"text": ""}\n')) * random.choice((1, 10**6, 3 * 10**7)), 1
        )
    if random.random() < 0.4:
        raw = mutate.raw_bytes(raw, random)
    calibrate(state.folder, "c4", raw)


def calibrate(folder: Path, dataset: str, raw: bytes) -> None:
    """Calibrate a tiny model on a file."""
    (folder / "data").write_bytes(raw)
    run(
        *("calibrate", "--dataset", dataset, "--path", folder / "data", "--checkpoint", folder / "model"),
        *("--nsamples", "2", "--seqlen", "8", "--workspace", folder / "workspace"),
    )


SURFACE = Surface("c4", prepare, attempt)
