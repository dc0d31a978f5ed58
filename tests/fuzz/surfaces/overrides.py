"""`-s KEY=VALUE`."""

from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.surfaces.recipe import RECIPE, WORDS

KEYS = (
    "name", "frontend.checkpoint", "frontend.type", "frontend.shape", "frontend.shape.input_ids",
    "frontend.shape.batch", "frontend.quantize", "frontend.quantize.type", "frontend.quantize.calib_args.percdamp",
    "frontend.quantize.table", "frontend.adapter", "frontend.model_kwargs.tp", "split.points", "dataset.name",
    "dataset.path", "dataset.seqlen", "backend.type", "backend.dtype", "backend.compile", "backend.compile.block",
    "backend.compile.cache", "parity.text", "parity.prompt_tokens", "parity.gate", "workspace.path",
    "workspace.workers", "workspace.cluster", "graph.extra_ops", "", ".", "a..b", "name.x",
    "frontend.shape.input_ids.0", "x" * 300, "parity." * 500 + "a", "größe", "a\nb", "=", "frontend",
)  # fmt: skip


def prepare(inputs: Any, folder: Path) -> Path:
    (folder / "a.txt").write_text("the list")
    (folder / "recipe.yaml").write_text(RECIPE.replace("c4:64,alpaca:64", "c4").replace("path: c4=", "#"))
    return folder / "recipe.yaml"


def attempt(file: Path, random: Random) -> None:
    options = []
    for _ in range(random.randint(1, 3)):
        value = random.choice((*WORDS, *mutate.TEXTS, "1", "int8", "[[8], [16]]"))
        override = f"{random.choice(KEYS)}={value}"
        if random.random() < 0.2:
            override = mutate.text(override, random, WORDS)
        options += [
            "-s",
            override.replace("\0", "0").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"),
        ]
    run("compile", file, "--dry-run", *options)


SURFACE = Surface("overrides", prepare, attempt)
