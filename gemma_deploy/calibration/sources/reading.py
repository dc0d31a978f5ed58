"""What the readers share: opening a file, and the sentences about files that are not what they should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_deploy import reading
from gemma_deploy.errors import CalibrationError
from gemma_deploy.reading import NotJsonError

Row = Mapping[str, Any]
Turns = list[dict[str, str]]  # {"role": "user" | "assistant", "content": text}

AGAIN = "copy or download it again, or leave --path out to use the bundled sample"
JSON_TYPES: dict[type, str] = {
    dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip


def wrong(what: str, path: Path, at: str | None = None, *, expected: str, next_step: str = AGAIN) -> CalibrationError:
    """The error about a data file; `at` is the line, entry or archive member."""
    return CalibrationError(what, where=f"{path}, {at}" if at else str(path), expected=expected, next_step=next_step)


@contextmanager
def explained(path: Path, expected: str) -> Iterator[None]:
    """Turn what the operating system says about `path` into a message."""
    try:
        if reading.is_file(path) and path.stat().st_size == 0:
            raise wrong("the file is empty", path, expected=expected)
        yield
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror or error}", path, expected=expected) from error


def parse_json(raw: bytes, path: Path, at: str | None, *, expected: str) -> Any:
    """Parse UTF-8 JSON, or say where it stops being that.

    Scraped text has halves of surrogate pairs, which tokenizers refuse: they become U+FFFD.
    """
    try:
        value = reading.parse_json(raw)
        return reading.with_whole_characters(value) if b"\\u" in raw else value
    except UnicodeDecodeError as error:
        raise wrong(f"is not UTF-8 text (byte {error.start})", path, at, expected=expected) from error
    except NotJsonError as error:
        place = f" (character {error.column})" if at else f" (line {error.line}, character {error.column})"
        said = error.what + (place if error.line else "")
        raise wrong(f"is not JSON: {said}", path, at, expected=expected) from error


def string_fields(entry: object, keys: tuple[str, ...]) -> str | None:
    """What is wrong with an entry that should have these text fields; None when nothing is."""
    if not isinstance(entry, dict):
        return f"is {json_type(entry)}, not an object"
    missing = [key for key in keys if key not in entry]
    if missing:
        return (
            f"has no {' and no '.join(map(repr, missing))} (its keys: {', '.join(map(str, list(entry)[:8])) or 'none'})"
        )
    other = [key for key in keys if not isinstance(entry[key], str)]
    return f"{other[0]!r} is {json_type(entry[other[0]])}, not text" if other else None


def json_type(value: object) -> str:
    """What JSON calls the type of a parsed value."""
    return JSON_TYPES.get(type(value), "something else")
