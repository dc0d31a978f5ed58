"""Others' word on what a Gemma 4 says: TRL's copies of its chat templates, transformers' parser of replies."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

REVISIONS = ("gemma4_v2", "gemma4_v3", "gemma4", "gemma4_v4", "gemma4_v5")  # of google/gemma-4-E2B-it, oldest first


@functools.cache
def _trl() -> Path:
    """Where TRL lies; importing it would take seconds."""
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def published(revision: str) -> str:
    """A chat template as Google published it."""
    return (_trl() / "chat_templates" / f"{revision}.jinja").read_text(encoding="utf-8")


@functools.cache
def response_template() -> dict[str, Any]:
    """How transformers is told to parse the replies of Gemma 4: `gemma4_template` of TRL."""
    tree = ast.parse((_trl() / "chat_template_utils.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "gemma4_template":
            return ast.literal_eval(node.value)
    raise AssertionError("TRL has no gemma4_template any more")


def parsed_by_transformers(text: str) -> dict[str, Any]:
    """`parse_response` of transformers."""
    from transformers.utils.chat_parsing import parse_response

    return parse_response(text, response_template(), prefix="")
