"""Schema errors of pydantic as sentences: what was found, what was expected, the nearest known key."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from gemma_deploy.recipe import guesses
from gemma_deploy.recipe.document import Path, dotted

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text without half surrogate pairs (bytes that are no UTF-8 become such)",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "string_too_short": "text that is not empty",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def nearest(word: str, known: list[str], cutoff: float = 0.6) -> str | None:
    """The known word `word` was probably meant to be."""
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=cutoff)
    return close[0] if close else None


def section_at(root: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The class of the section at `path`, or None where the schema ends."""
    here: type[BaseModel] | None = root
    for part in path:
        field = here.model_fields.get(str(part)) if here else None
        here = None if field is None else _class_in(field.annotation)
    return here


def _class_in(annotation: Any) -> type[BaseModel] | None:
    """The section class in `Section` or `Section | None`."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def wants_text(root: type[BaseModel], path: Path) -> bool:
    """Whether the key at `path` takes any text: `str` or `str | None`, bounds included."""
    section = section_at(root, path[:-1])
    field = section.model_fields.get(str(path[-1])) if section and path else None
    if field is None:
        return False
    kinds = (field.annotation, *get_args(field.annotation))
    return any((get_args(kind)[0] if get_origin(kind) is Annotated else kind) is str for kind in kinds)


def all_keys(root: type[BaseModel], path: Path = ()) -> dict[str, list[Path]]:
    """Key name -> every path the schema knows it at."""
    found: dict[str, list[Path]] = {}
    for name, field in root.model_fields.items():
        found.setdefault(name, []).append((*path, name))
        inner = _class_in(field.annotation)
        for key, paths in (all_keys(inner, (*path, name)) if inner else {}).items():
            found.setdefault(key, []).extend(paths)
    return found


def describe(value: Any) -> str:
    """A value as the reader wrote it, with its kind."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"{value} (a number)"
        case str():
            return f"'{value if len(value) <= 60 else value[:57] + '...'}' (text)"
        case list() | tuple():
            return f"a list of {len(value)}"
    return "a mapping"


def unknown_key(root: type[BaseModel], path: Path, above: Path = ()) -> str:
    """The sentence for a key the schema does not know: near miss, right key in the wrong place, or what is known."""
    key, section = str(path[-1]), section_at(root, path[:-1])
    known = sorted(section.model_fields) if section else []
    everywhere = all_keys(root)
    if key in everywhere:
        places = " or ".join(f"`{dotted((*above, *place))}`" for place in everywhere[key])
        return f"unknown key here; it belongs at {places}"
    if close := nearest(key, known):
        return f"unknown key; did you mean `{dotted((*above, *path[:-1], close))}`?"
    if close := nearest(key, sorted(everywhere), cutoff=0.8):
        return f"unknown key; did you mean `{dotted((*above, *everywhere[close][0]))}`?"
    return f"unknown key; known here: {', '.join(known) or 'none'}"


def sentence(root: type[BaseModel], error: ErrorDetails, above: Path = ()) -> str:
    """One pydantic error as one sentence.

    Args:
        above: where `root` stands in a recipe.
    """
    kind, context, path = error["type"], error.get("ctx", {}), tuple(error["loc"])
    if kind == "extra_forbidden":
        return unknown_key(root, path, above)
    if kind == "missing":
        return "missing, and required"
    got = f"got {describe(error['input'])}"
    advice = guesses.advice((*above, *path), error["input"])
    if kind == "literal_error":
        allowed = [part.strip("' ") for part in str(context["expected"]).replace(" or ", ", ").split(", ")]
        close = nearest(str(error["input"]), allowed) if len(allowed) > 1 else None
        hint = f"; {advice}" if advice else f"; did you mean `{close}`?" if close else ""
        return f"{got}, expected {'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}{hint}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{got}, expected {words} {context[name]}"
    if kind == "string_pattern_mismatch":
        return f"{got}, expected cpu, cuda or cuda:N"
    expected = _EXPECTED.get(kind, error["msg"])
    quote = ": put it in quotes" if kind == "string_type" and isinstance(error["input"], int | float) else ""
    return f"{got}, expected {expected}{quote}" + (f"; {advice}" if advice else "")
