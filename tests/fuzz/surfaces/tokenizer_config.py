"""The JSON files beside a tokenizer: tokenizer_config, special_tokens_map, added_tokens, chat_template."""

from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.harness import Surface
from tests.fuzz.inputs import Inputs, copy
from tests.fuzz.surfaces.tokenizer_json import calibrate, generate, replace

TOKENS = {"0": {"content": "<pad>", "special": True}, "600": {"content": "<new>", "special": False}}
CONTENT: dict[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>", "pad_token": None,
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "model_max_length": 10**18,
        "added_tokens_decoder": TOKENS,
        "chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "x"}],
    },
    "special_tokens_map.json": {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"},
    "added_tokens.json": {"<new>": 600, "<newer>": 601},
    "chat_template.json": {"chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"},
}  # fmt: skip
MAIN = "tokenizer_config.json"


def prepare(inputs: Inputs, folder: Path) -> tuple[Path, Path]:
    artifact = copy(inputs.artifact("genai"), folder / "artifact")
    replace(artifact, "chat_template.jinja", b"{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
    return copy(inputs.checkpoint(), folder / "model"), artifact


def attempt(state: tuple[Path, Path], random: Random) -> None:
    checkpoint, artifact = state
    if random.random() < 0.7:
        replace(artifact, MAIN, mutate.json_file(CONTENT[MAIN], random))
        generate(artifact, random)
        return
    name = random.choice(list(CONTENT))
    for other in CONTENT:
        (checkpoint / other).unlink(missing_ok=True)
    (checkpoint / name).write_bytes(mutate.json_file(CONTENT[name], random))
    calibrate(checkpoint)


SURFACE = Surface("tokenizer_config", prepare, attempt)
