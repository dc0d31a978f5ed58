"""Arguments: options of every command with values of every kind."""

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click

from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy

HARMLESS = (
    "inspect",
    "verify",
    "recipes",
    "compile",
    "stage",
    "split",
    "run",
    "chat",
    "bench",
    "eval",
    "parity",
    "calibrate",
)
VALUES = (
    "0", "1", "-1", "2", "1e-310", "1e310", "nan", "inf", "-inf", "1e5", "9" * 25, "9" * 5000, "0x10", "1_0", "٣",
    "1.5", "", " ", "a,b", "1,2", ",", "2,1", "-", "--", "c4", "c4:1", "c4:1,alpaca:1", "c4=x", "ceval", "none", "hf",
    "patched", "val", "~nobody", ".", "/", "..", "x" * 300, "x/" * 2500, "\udcff", "demo", "config.json", "/dev/null",
    "/dev/full", "größe", "a=b", "name=x", "true",
)  # fmt: skip
NUMBERS = ("0", "1", "2", "7", "-1", "1e-310", "1e308", "0.5", "nan", "inf", "9" * 25, "2147483648", "1e5", "100000")
# What takes minutes or other machines is not tried.
LEFT_OUT = ("--cluster", "--workers", "--processes")


@dataclass
class State:
    folder: Path
    artifact: Path
    checkpoint: Path


def prepare(inputs: Inputs, folder: Path) -> State:
    artifact = copy(inputs.artifact("genai"), folder / "artifact")
    checkpoint = copy(inputs.checkpoint(), folder / "model")
    (folder / "recipe.yaml").write_text(
        f"name: t\nfrontend: {{checkpoint: {checkpoint}, shape: {{input_ids: [[16], [32]]}}}}\n"
        "backend: {dtype: fp32}\n"
    )
    return State(folder, artifact, checkpoint)


def attempt(state: State, random: Random) -> None:
    from gemma_deploy.cli import cli

    name = random.choice(HARMLESS)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    known = (state.artifact, state.checkpoint, state.folder / "recipe.yaml")
    words: list[object] = ["-v"] if random.random() < 0.05 else []
    words.append(name)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words.append(random.choice((*known, random.choice(VALUES))))
        elif random.random() < 0.25 and not set(parameter.opts) & set(LEFT_OUT):
            words.append(random.choice((*parameter.opts, *parameter.secondary_opts)))
            if not getattr(parameter, "is_flag", False):
                words.append(value(parameter.type, known, random))
    if name in ("compile",):
        words.append("--dry-run")
    words += {"run": ["-n", "1", "-p", "the"], "bench": ["--contexts", "x"], "chat": ["-n", "1"]}.get(name, [])
    if name in ("eval", "parity", "calibrate"):
        words += ["--no-such-option"] if random.random() < 0.5 else []
    if random.random() < 0.2:
        random.shuffle(words)
    before = os.getcwd()
    os.chdir(state.folder)
    try:
        run(*words)
    finally:
        os.chdir(before)


def value(kind: click.ParamType, known: tuple[Path, ...], random: Random) -> object:
    """A value for an option, most of the time one of its type."""
    if random.random() < 0.2:
        return random.choice((*known, *VALUES))
    if isinstance(kind, click.Choice):
        return random.choice(list(kind.choices))
    if kind.name.startswith(("integer", "float")):
        return random.choice(NUMBERS)
    return random.choice((*known, "demo", "a.txt", "c4", "c4:1", "none"))


SURFACE = Surface("command_line", prepare, attempt)
