"""A tiny artifact that many texts are computed on at once: windows of 8, prompts of several pages."""

import hashlib
import json
import re
import shutil

import pytest

from gemma_deploy.chat import GEMMA4
from gemma_deploy.names import MANIFEST
from tests.chat.reference import published
from tests.native.conftest import native_library  # noqa: F401
from tests.runtime.make import write_tokenizer

CONTEXT = 800
MORE = (*(f"<{one}>" for one in ("|turn", "turn|", "|think|", "|tool", "tool|")), *GEMMA4.markers, "<|tool_response>")
MARKERS = re.compile("(" + "|".join(map(re.escape, GEMMA4.markers)) + ")")


@pytest.fixture(scope="session")
def served(native_library, once):  # noqa: F811
    """An artifact of a tiny Gemma 3 in int8 for the native back end, its checkpoint beside it; read only."""

    def make(root):
        from gemma_deploy.compile import compile_recipe
        from tests.native.test_backend import recipe_of

        root.mkdir()
        compile_recipe(recipe_of(root, "gemma3_text", "w8a16", context=CONTEXT, max_position_embeddings=1024))

    return once("served", make) / "w" / "x"


@pytest.fixture(scope="session")
def speaking(served, once):
    """The same weights under a tokenizer and a chat template of Gemma 4: thinking and tool calls have markers."""

    def make(root):
        shutil.copytree(served, root / "x")
        write_tokenizer(root / "x", template=published("gemma4_v5"), more=MORE)
        manifest = root / "x" / MANIFEST
        told = json.loads(manifest.read_text())
        told["chat_format"] = GEMMA4.name
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            body = (root / "x" / name).read_bytes()
            told["files"][name] = {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        manifest.write_text(json.dumps(told))

    return once("speaking", make) / "x"


@pytest.fixture(scope="session")
def speaker(speaking):
    from gemma_deploy.engine import open_engine

    return open_engine(speaking, threads=1)


def saying(reply):
    """A grammar that nothing but one reply follows, its markers as special tokens."""
    parts = [one if MARKERS.fullmatch(one) else json.dumps(one) for one in MARKERS.split(reply) if one]
    return "start: " + " ".join(parts)


@pytest.fixture(scope="session")
def adaptable(native_library, once):  # noqa: F811
    """A folder with an artifact in float32 that takes adapters (w/x), and two of rank 16 that PEFT wrote; read only."""

    def make(root):
        from gemma_deploy.compile import compile_recipe
        from gemma_deploy.recipe import Recipe
        from tests.backends.peft_make import adapted
        from tests.native.test_adapters import eager_model
        from tests.native.test_backend import recipe_of

        root.mkdir()
        recipe_of(root, "gemma3_text", "fp32", context=CONTEXT, max_position_embeddings=1024)
        file = root / "recipe.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"adapters": {"rank": 16}}))
        compile_recipe(Recipe.load(file), parity=False)
        for name, seed in (("pirate", 1), ("poet", 2)):
            adapted(eager_model(root / "ck"), seed, rank=16).save_pretrained(root / "runs" / name)

    return once("served-adapters", make)
