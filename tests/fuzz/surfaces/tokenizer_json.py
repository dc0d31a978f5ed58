"""tokenizer.json of a checkpoint (calibration) and of an artifact (run)."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy

FILE = "tokenizer.json"


@dataclass
class State:
    checkpoint: Path
    artifact: Path
    content: dict[str, Any]


def prepare(inputs: Inputs, folder: Path) -> State:
    checkpoint = copy(inputs.checkpoint(), folder / "model")
    artifact = copy(inputs.artifact("genai"), folder / "artifact")
    return State(checkpoint, artifact, json.loads((checkpoint / FILE).read_text()))


def attempt(state: State, random: Random) -> None:
    content = mutate.json_file(state.content, random)
    if random.random() < 0.3:
        (state.checkpoint / FILE).write_bytes(content)
        calibrate(state.checkpoint)
    else:
        replace(state.artifact, FILE, content)
        generate(state.artifact, random)


def calibrate(checkpoint: Path) -> None:
    """Let text become tokens with a checkpoint's tokenizer."""
    workspace = checkpoint.parent / "workspace"
    run(
        *("calibrate", "--dataset", "c4", "--checkpoint", checkpoint, "--workspace", workspace),
        *("--nsamples", "1", "--seqlen", "8", "--force"),
    )


def generate(artifact: Path, random: Random) -> None:
    """Let text become tokens with an artifact's tokenizer."""
    run("run", artifact, "-p", "the list", "-n", "1", *random.choice(((), ("--chat",))))


def replace(artifact: Path, name: str, content: bytes) -> None:
    """Change a file of an artifact, and let the manifest know what it is now."""
    (artifact / name).write_bytes(content)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (artifact / "manifest.json").write_text(json.dumps(manifest))


SURFACE = Surface("tokenizer_json", prepare, attempt)
