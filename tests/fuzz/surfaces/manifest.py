"""manifest.json of an artifact, under every command that reads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy

MORE: dict[str, Any] = {
    "sensitivity": {"layers": [1e-3] * 7, "table": 1e-4, "tokens": 32},
    "quantization": {"layers": [], "settings": {}, "table": {}, "activations": {"bits": 8, "kept": []}},
    "rescaling": {"exponents": {"model.layers.0.in": 2}, "wide": ["mlp"], "absmax": {"model.layers.0.mlp.in": 7.0}},
    "parity": {
        "summary": "passed", "passed": True, "notes": ["a"], "divergence": None, "effect": {"kl_mean": 0.1},
        "measures": [],
        "lines": [{"comparison": "a = b", "name": "kl", "value": 0.1, "limit": 1, "passed": True}],
    },
    "calibration": {"fingerprint": "0", "sources": [], "windows": {"nsamples": 2}},
    "kernels": {"integer": True, "candidates": 0, "wide": [], "block": 32, "windowed": False},
}  # fmt: skip
COMMANDS = (
    ("inspect",), ("inspect", "--json", "--params"), ("verify",), ("run", "-p", "the", "-n", "1"),
    ("run", "-p", "the", "-n", "1", "--chat"), ("chat",),
    ("eval", "--task", "ppl", "--against", "none", "--windows", "1", "--seqlen", "8"),
)  # fmt: skip


@dataclass
class State:
    artifacts: dict[Path, dict[str, Any]]
    recipe: Path


def prepare(inputs: Inputs, folder: Path) -> State:
    artifacts = {}
    for kind in ("static", "genai"):
        place = copy(inputs.artifact(kind), folder / kind)
        artifacts[place] = json.loads((place / "manifest.json").read_text())
    return State(artifacts, inputs.artifact("genai").parents[1] / "recipe.json")


def attempt(state: State, random: Random) -> None:
    artifact, manifest = random.choice(list(state.artifacts.items()))
    manifest = dict(manifest)
    for key in random.sample(list(MORE), random.choice((0, 1, 2))):
        manifest[key] = MORE[key]
    (artifact / "manifest.json").write_bytes(mutate.json_file(manifest, random))
    if random.random() < 0.1:
        run("compile", state.recipe, "--out", artifact, "--no-parity", "--dry-run")
        return
    command, *options = random.choice(COMMANDS)
    run(command, artifact, *options)


SURFACE = Surface("manifest", prepare, attempt)
