"""A recipe file as plain values plus the place every key came from.

First step of reading a recipe: YAML text in, `Document` out. Nothing here knows the schema. Values are
built from the composed YAML nodes, never by a constructor that could run code, so a hostile file costs
at most `_MAX_NODES` small objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]

# The longest recipe here has 3,000 characters; what is more than this takes seconds to read, and to say what is wrong.
MAX_CHARS = 1 << 16
_MAX_NODES = 5_000
_MOST_SENTENCES = 50
_MAX_DEPTH = 32

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^${}]*))?\}")
_STANDARD = "tag:yaml.org,2002:"
_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}
_INT = re.compile(r"[-+]?[0-9]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class _Loader(yaml.SafeLoader):
    """Composes nodes only: every plain scalar stays text, `_plain` gives it a type."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML's own class attribute)


def _plain(text: str) -> Any:
    """The value of an unquoted scalar (YAML 1.2 numbers, YAML 1.1 booleans as PyYAML users expect)."""
    if text in _NULL:
        return None
    if text.lower() in _TRUE and text in {text.lower(), text.capitalize(), text.upper()}:
        return True
    if text.lower() in _FALSE and text in {text.lower(), text.capitalize(), text.upper()}:
        return False
    if _INT.fullmatch(text):
        return int(text, 16) if text.startswith("0x") else int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


OVERRIDE = "-s "  # begins the place of what the command line says


def dotted(path: Path) -> str:
    """`("a", "b", 0)` as the reader writes it: `a.b[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text or "the recipe"


@dataclass
class Document:
    """Values of a recipe, where each one was written, and what was wrong on the way.

    Args:
        values: nested dicts, lists and scalars, `${VAR}` expanded, overrides applied.
        places: path of a key -> `line 7` or `-s a.b=c`.
        problems: (path, sentence) for everything refused so far.
        expanded: path of an unquoted value with `${VAR}` in it -> its text, which is the value where text is wanted.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)
    problems: list[tuple[Path, str]] = field(default_factory=list)
    expanded: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """Where `path`, or the nearest key above it, was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")

    def get(self, path: Path) -> Any:
        """The value at `path`, or None."""
        value: Any = self.values
        for part in path:
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value

    def remove(self, path: Path) -> None:
        """Drop the value at `path` if it is a key of a mapping."""
        if not path:
            return
        parent = self.get(path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)

    def sentences(self) -> list[str]:
        """All problems in the order of the file, each with its place."""

        def order(item: tuple[str, Path, str]) -> tuple[int, int]:
            where = item[0]
            return (0, int(where[5:])) if where.startswith("line ") else (1, 0)

        located = [(self.place(path), path, text) for path, text in self.problems]
        lines = []
        for where, path, text in sorted(located, key=order):
            key = f"{dotted(path)}: " if path else ""
            lines.append(f"{where}: {key}{text}" if where else f"{key}{text}")
        found = list(dict.fromkeys(lines))
        more = len(found) - _MOST_SENTENCES
        return found if more <= 0 else [*found[:_MOST_SENTENCES], f"... and {more} more"]


class _Builder:
    """Turns composed nodes into values, noting places and problems."""

    def __init__(self, document: Document, env: Mapping[str, str], place: str | None = None) -> None:
        self.document, self.env, self.fixed_place = document, env, place
        self.nodes = 0
        self.open: set[int] = set()

    def refuse(self, path: Path, text: str) -> None:
        self.document.problems.append((path, text))

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.document.places.setdefault(path, self.fixed_place or f"line {node.start_mark.line + 1}")
        self.nodes += 1
        if self.nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            raise _TooLargeError
        if id(node) in self.open:
            self.refuse(path, "an alias contains itself: write the value out")
            return None
        kind = node.tag.removeprefix(_STANDARD)
        if not node.tag.startswith(_STANDARD) or kind.startswith("python") or kind not in _ALLOWED_TAGS:
            tag = node.tag if not node.tag.startswith(_STANDARD) else "!!" + kind
            self.refuse(path, f"YAML tag `{tag}` is refused: a recipe holds only text, numbers, lists and mappings")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path, kind)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            return self.mapping(node, path) if isinstance(node, yaml.MappingNode) else None
        finally:
            self.open.discard(id(node))

    def scalar(self, node: yaml.ScalarNode, path: Path, kind: str) -> Any:
        text, from_outside = self.expand(node.value, path)
        if node.style and kind == "str":
            return text
        value = _plain(text)
        if text != node.value and (from_outside or value is not None) and text:
            self.document.expanded[path] = text
        return value

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
                self.refuse(path, f"line {line}: a key must be a word, not a list, a mapping or nothing")
                continue
            key = key_node.value
            child = (*path, key)
            if key in values:
                first = self.document.places.get(child, "above")
                self.refuse(child, f"the key is given twice, here and on line {line}: keep one")
                self.document.places[child] = first
                continue
            if key == "<<" and key_node.style is None:
                self.refuse(child, "merge keys (<<) are refused: write the keys out")
                continue
            self.document.places[child] = self.fixed_place or f"line {line}"
            values[key] = self.build(value_node, child)
        return values

    def expand(self, text: str, path: Path) -> tuple[str, bool]:
        """`${VAR}` and `${VAR:-default}` (default when unset or empty, as in a shell).

        Returns:
            The text, and whether some of it comes from the environment.
        """
        found: list[str] = []

        def replace(match: re.Match[str]) -> str:
            name, default = match.group(1), match.group(2)
            value = self.env.get(name)
            if default is not None and not value:
                return default
            if value is None:
                self.refuse(path, f"the environment variable {name} is not set; set it or write ${{{name}:-default}}")
                return name
            found.append(value)
            return value

        if "${" in _VARIABLE.sub("", text):
            self.refuse(path, f"`{text}` is not understood: write ${{NAME}} or ${{NAME:-default}}, not nested")
            return text, False
        text = _VARIABLE.sub(replace, text)
        return text, any(found)


class _TooLargeError(Exception):
    """More nodes or deeper nesting than any recipe has."""


_ALLOWED_TAGS = {"map", "seq", "str", "int", "float", "bool", "null"}


def _compose(text: str, document: Document, env: Mapping[str, str], place: str | None, path: Path) -> Any:
    """One YAML document as values; problems go into `document`."""
    if len(text) > MAX_CHARS:
        document.problems.append((path, f"{len(text)} characters are too many for a recipe (limit {MAX_CHARS})"))
        return None
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Builder(document, env, place).build(node, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        spot = f"line {mark.line + 1}, column {mark.column + 1}: " if mark and not place else ""
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        hint = "; inside {} or [] a ${VAR} must stand in quotes" if "${" in line else ""
        document.problems.append((path, f"{spot}not valid YAML: {error.problem or error.context}{hint}"))
    except yaml.YAMLError as error:
        document.problems.append((path, f"not valid YAML: {' '.join(str(error).split())}"))
    except (_TooLargeError, RecursionError):
        document.problems.append((path, f"nested or aliased beyond {_MAX_NODES} values or {_MAX_DEPTH} levels"))
    return None


def parse(text: str, overrides: Sequence[str], env: Mapping[str, str]) -> Document:
    """Read YAML `text`, then apply `a.b.c=value` overrides.

    Args:
        text: the recipe file.
        overrides: what stood behind each `-s`; the value is YAML.
        env: where `${VAR}` is looked up.

    Returns:
        A `Document`; look at its `problems` before trusting its values.
    """
    document = Document()
    values = _compose(text, document, env, None, ())
    document.places.pop((), None)
    if isinstance(values, dict):
        document.values = values
    elif not document.problems:
        got = "nothing" if values is None else f"a {type(values).__name__}"
        document.problems.append(((), f"the file holds {got}, expected a mapping that starts with `name:`"))
    for override in overrides:
        _override(document, override, env)
    return document


def set_value(document: Document, path: tuple[str, ...], value: Any, *, place: str) -> None:
    """Set one key, making the mappings above it; a scalar in the way is a problem."""
    node = document.values
    for depth, part in enumerate(path[:-1], 1):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            held = dotted(path[:depth])
            document.problems.append((path, f"cannot be set: {held} is {child!r}, not a section"))
            return
        document.places.setdefault(path[:depth], place)
        node = child
    node[path[-1]] = value
    for old in [known for known in document.places if known[: len(path)] == path]:
        del document.places[old]
    for old in [known for known in document.expanded if known[: len(path)] == path]:
        del document.expanded[old]
    document.problems[:] = [item for item in document.problems if item[0][: len(path)] != path]
    document.places[path] = place


def _override(document: Document, override: str, env: Mapping[str, str]) -> None:
    """Apply one `a.b.c=value`."""
    place = f"{OVERRIDE}{override}"
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        document.problems.append(((), f"`{place}` is not understood: write -s section.key=value"))
        return
    fresh = Document()
    value = _compose(text, fresh, env, place, path)
    set_value(document, path, value, place=place)
    document.problems.extend(fresh.problems)
    document.places.update(fresh.places)
    document.expanded.update(fresh.expanded)
