"""A document becomes a recipe: every mistake of it collected, so that one error tells them all.

What is wrong is taken out, and the rules about the other keys still run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from gemma_deploy.backends import DEFAULT, ROWS, backend
from gemma_deploy.backends.spec import read_options
from gemma_deploy.checkpoint.adapters.merging import AdapterRef
from gemma_deploy.recipe import document as documents
from gemma_deploy.recipe import explain, rules
from gemma_deploy.recipe.document import Document
from gemma_deploy.recipe.normal import normalise
from gemma_deploy.recipe.sections import RecipeSections

# Stand-ins for keys that are missing or wrong, so that the rules about the other keys still run.
_STAND_INS: dict[documents.Path, Any] = {
    ("name",): "unnamed",
    ("frontend", "checkpoint"): "demo",
    ("frontend", "shape", "input_ids"): [[16], [16]],
    ("backend", "dtype"): "fp32",
}
_OPTIONS: documents.Path = ("backend", "compile")
T = TypeVar("T", bound=RecipeSections)


def replace_checkpoint(document: Document, checkpoint: str) -> None:
    """Let `--checkpoint` say which model it is, and of which type, unless `-s` does."""
    place = f"--checkpoint {checkpoint}"
    kind = "gguf" if checkpoint.lower().endswith(".gguf") else "huggingface"
    documents.set_value(document, ("frontend", "checkpoint"), checkpoint, place=place)
    path = ("frontend", "type")
    if document.get(path) is None or not document.place(path).startswith(documents.OVERRIDE):
        documents.set_value(document, path, kind, place=place)


def replace_adapters(document: Document, adapters: Sequence[AdapterRef]) -> None:
    """Let `--adapter` say what is added to the model."""
    found = [one.to_json() for one in adapters]
    place = " ".join(f"--adapter {one.path}" for one in adapters)
    value = found[0] if len(found) == 1 and isinstance(found[0], str) else found
    documents.set_value(document, ("frontend", "adapter"), value, place=place)


def build(cls: type[T], document: Document) -> T | None:
    """Validate `document`; problems are added to it, and None comes back only if no recipe could be formed."""
    normalise(cls, document)
    _check_options(document)
    spoiled = {_key(path) for path, _ in document.problems}
    recipe, errors = _validate(cls, document.values)
    for error in errors:
        path = tuple(error["loc"])
        if not any(path[: len(key)] == key for key in spoiled if key):
            document.problems.append((path, explain.sentence(cls, error)))
    bad = spoiled | {_key(tuple(error["loc"])) for error in errors}
    if recipe is None:
        recipe = _without(cls, document, bad)
    if recipe is not None:
        document.problems.extend(rules.contradictions(recipe, bad - {()}))
    return recipe


def _check_options(document: Document) -> None:
    """Refuse keys of `backend.compile` that the back end does not know, or values of another kind."""
    section = document.values.get("backend")
    if not isinstance(section, dict):
        return
    name, given = section.get("type", DEFAULT), section.get("compile")
    if name not in ROWS or not isinstance(given, dict):
        return
    options = backend(str(name)).options
    try:
        read_options(options, given)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            path = (*_OPTIONS, *one["loc"])
            document.problems.append((path, explain.sentence(options, one, above=_OPTIONS)))


def _without(cls: type[T], document: Document, bad: set[documents.Path]) -> T | None:
    """What is left of the recipe without the keys in `bad`, so that the rules about the other keys still run."""
    remove = set(bad)
    for _ in range(8):  # a section that lost a required key goes as well, from the inside out
        for path in remove:
            document.remove(path)
        for path, value in _STAND_INS.items():
            if document.get(path) is None:
                _put(document.values, path, value)
        recipe, errors = _validate(cls, document.values)
        if recipe is not None:
            return recipe
        remove = {_key(tuple(error["loc"]))[: -1 if error["type"] == "missing" else None] for error in errors}
    return None


def _validate(cls: type[T], values: dict[str, Any]) -> tuple[T | None, list[Any]]:
    try:
        return cls.model_validate(values), []
    except ValidationError as error:
        return None, list(error.errors(include_url=False))


def _key(path: documents.Path) -> documents.Path:
    """`path` up to the last key before a list index."""
    for depth, part in enumerate(path):
        if isinstance(part, int):
            return path[:depth]
    return path


def _put(values: dict[str, Any], path: documents.Path, value: Any) -> None:
    for part in path[:-1]:
        inner = values.get(str(part))
        if not isinstance(inner, dict):
            inner = values[str(part)] = {}
        values = inner
    values[str(path[-1])] = value
