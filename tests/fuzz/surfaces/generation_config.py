"""generation_config.json beside a checkpoint."""

from pathlib import Path
from random import Random

from tests.fuzz import mutate
from tests.fuzz.harness import Surface, run
from tests.fuzz.inputs import Inputs, copy

CONTENT = {
    "eos_token_id": [1, 106], "bos_token_id": 2, "pad_token_id": 0, "do_sample": True, "top_k": 64, "top_p": 0.95,
    "temperature": 1.0, "cache_implementation": "hybrid", "transformers_version": "5.0.0",
}  # fmt: skip


def prepare(inputs: Inputs, folder: Path) -> Path:
    return copy(inputs.checkpoint(), folder / "model")


def attempt(checkpoint: Path, random: Random) -> None:
    (checkpoint / "generation_config.json").write_bytes(mutate.json_file(CONTENT, random))
    if random.random() < 0.9:
        run("inspect", checkpoint)
    else:
        run("stage", checkpoint, checkpoint.parent / "staged", "--force")


SURFACE = Surface("generation_config", prepare, attempt)
