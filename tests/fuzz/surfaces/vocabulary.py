"""The vocabulary inside a GGUF file, and SentencePiece's file of its own."""

import contextlib
from pathlib import Path
from random import Random
from typing import Any

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import DeployError
from gemma_deploy.text import Tokenizer, check_text
from tests.fuzz import mutate
from tests.fuzz.harness import Surface
from tests.fuzz.inputs import Inputs, copy
from tests.text import make

PIECES = [("<pad>", 0.0, 3), ("<eos>", 0.0, 3), ("<bos>", 0.0, 3), ("<unk>", 0.0, 2), ("<mask>", 0.0, 4)]
WORDS = ("▁", "t", "h", "e", "▁t", "he", "▁the", "  ", "\n")
PIECES += [(text, -float(number), 1) for number, text in enumerate(WORDS)]


def prepare(inputs: Inputs, folder: Path) -> dict[str, Any]:
    checkpoint = copy(inputs.checkpoint(), folder / "model")
    (checkpoint / "tokenizer.json").unlink()
    (folder / "gguf").mkdir()
    changes = {
        "tokens": [text for text, _, _ in PIECES],
        "scores": [score for _, score, _ in PIECES],
        "kinds": [kind for _, _, kind in PIECES],
    }
    file = make.write_gguf(folder / "gguf" / "m.gguf", "gemma2", metadata={"chat_template": make.GEMMA_1}, **changes)
    model = make.write_sentencepiece(checkpoint / "tokenizer.model", PIECES)
    return {"gguf": file, "header": file.read_bytes(), "model": model, "pieces": model.read_bytes(), "at": checkpoint}


def attempt(state: dict[str, Any], random: Random) -> None:
    with contextlib.suppress(DeployError):
        if random.random() < 0.6:
            end = state["header"].index(b"token_embd")
            state["gguf"].write_bytes(mutate.raw_bytes(state["header"], random, end=end))
            opened = Checkpoint.open(state["gguf"])
        else:
            state["model"].write_bytes(mutate.raw_bytes(state["pieces"], random))
            opened = Checkpoint.open(state["at"])
        check_text(opened)
        Tokenizer.of(opened).encode("the list\n <bos>the")


SURFACE = Surface("vocabulary", prepare, attempt)
