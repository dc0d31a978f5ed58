"""Reading files that others wrote: only regular files, only to a limit, and a sentence for everything that is wrong.

A checkpoint, an artifact, a recipe and a data set come from anywhere. What Python's own functions do with such files is
wait for ever (named pipes), take the machine's memory (devices, files of holes, lists of lists), or raise errors that
nobody expects there (OSError 36 of `Path.exists`, RuntimeError of `Path.expanduser`, RecursionError and ValueError of
`json.loads`). The functions here raise the caller's own error with where, expected and the next step, or nothing.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_deploy.errors import DeployError, UsageError

LIMIT_BYTES = 64 << 20
TEXT_BYTES = 128 << 20  # of a text to measure on, which is in memory as a whole
# A value of JSON takes 3 bytes in a file and up to 200 in memory: this many stay below 1 GiB. The tokenizer of Gemma 3,
# the largest JSON file of a checkpoint, has 1.9 million commas and brackets.
MAX_VALUES = 2_500_000
NOWHERE, IMPOSSIBLE = "there is no such file or directory", "no file can have this name"
MAX_DIGITS = 300  # a whole number of 309 digits may be too large for a float; Python itself stops at 4,300
_LONG_NUMBER = re.compile(rf"(?<![0-9])[0-9]{{{MAX_DIGITS + 1}}}")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_A_JSON: dict[type, str] = {
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_FILES: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotJsonError(ValueError):
    """Text is not JSON, or not of the size that is read; its text says why.

    Args:
        what: why.
        line, column: where, counted from 1; None where no place is to blame.
    """

    def __init__(self, what: str, line: int | None = None, column: int | None = None, *, at: int | None = None) -> None:
        self.what, self.line, self.column = what, line, column
        super().__init__(what if line is None else f"{what}: line {line} column {column} (char {at})")


@dataclass(frozen=True)
class FileKind:
    """What one kind of file has to be, and how to speak about one that is not.

    Args:
        error: the class of its errors.
        expected: what it should be.
        next_step: what to do about one that is damaged.
        missing: what to do about one that is not there; where this is empty, it cannot be read like any other.
        unreadable: what to do about one that may not be read; `next_step` where this is empty.
        limit_bytes: the size up to which it is read.
        unique_keys: whether a JSON key that occurs twice is refused; the last one counts otherwise.
        finite: whether NaN, infinities and numbers too large for a float are refused in JSON.
        whole_characters: whether half a surrogate pair is refused in JSON.
    """

    error: type[DeployError]
    expected: str
    next_step: str
    missing: str = ""
    unreadable: str = ""
    limit_bytes: int = LIMIT_BYTES
    unique_keys: bool = False
    finite: bool = False
    whole_characters: bool = False

    def wrong(self, what: str, path: str | Path, next_step: str = "") -> DeployError:
        """The error that says `what` about the file."""
        return self.error(what, where=str(path), expected=self.expected, next_step=next_step or self.next_step)

    def unread(self, error: OSError, path: str | Path) -> DeployError:
        """The error for what the system said when the file was read."""
        if error.errno == errno.ENOENT and self.missing:
            return self.wrong("is missing", path, self.missing)
        return self.wrong(f"cannot be read: {error.strerror or error}", path, self.unreadable)


def open_regular(path: str | Path, *, pipes: bool = False) -> io.BufferedReader:
    """Open a file for reading; what is no regular file is refused without waiting for it.

    Args:
        path: the file; a link is followed.
        pipes: whether a pipe that the caller was started with (`<(...)` of a shell, /dev/stdin) is read too.

    Raises:
        OSError: with a reason that can follow "cannot be read: ".
    """
    try:
        _refuse_other_files(os.stat(path).st_mode, path, pipes=pipes)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:  # NUL, or half a surrogate pair
        raise OSError(errno.EINVAL, IMPOSSIBLE) from error
    try:
        _refuse_other_files(os.fstat(descriptor).st_mode, path, pipes=pipes)  # it may be another file by now
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, kind: FileKind, *, pipes: bool = False) -> bytes:
    """The content of a file.

    Args:
        path: the file.
        kind: its limit of size, and how errors are told.
        pipes: see `open_regular`.

    Raises:
        kind.error: it is not there, no regular file, may not be read, or is larger than the limit.
    """
    limit = kind.limit_bytes
    try:
        with open_regular(path, pipes=pipes) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1) if size <= limit else b""
    except OSError as error:
        raise kind.unread(error, path) from error
    if size > limit or len(data) > limit:
        has = f"{size} bytes" if size > limit else f"more than {limit} bytes"
        raise kind.wrong(f"has {has}; at most {limit} are read", path)
    return data


def read_text(path: str | Path, kind: FileKind, *, pipes: bool = False) -> str:
    """The content of a UTF-8 file, without a byte order mark.

    Raises:
        kind.error: as `read_bytes`, or it is not UTF-8.
    """
    data = read_bytes(path, kind, pipes=pipes)
    try:
        return decode(data)
    except UnicodeDecodeError as error:
        raise kind.wrong(f"is not UTF-8 text (byte {error.start})", path) from error


def read_json(path: str | Path, kind: FileKind) -> Any:
    """The value in a JSON file.

    Raises:
        kind.error: as `read_text`, or it is not JSON of this kind.
    """
    return value_in(read_bytes(path, kind), path, kind)


def read_object(path: str | Path, kind: FileKind) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        kind.error: as `read_json`, or it holds another value.
    """
    return object_in(read_bytes(path, kind), path, kind)


def object_in(data: bytes, path: str | Path, kind: FileKind) -> dict[str, Any]:
    """The object in the bytes of a JSON file.

    Args:
        data: what `read_bytes` gave.
        path: the file, for messages.
        kind: see `FileKind`.

    Raises:
        kind.error: they are not UTF-8, not JSON of this kind, or hold another value.
    """
    value = value_in(data, path, kind)
    if not isinstance(value, dict):
        raise kind.wrong(f"holds {_A_JSON[type(value)]}, expected an object {{...}}", path)
    return value


def value_in(data: bytes, path: str | Path, kind: FileKind) -> Any:
    """The value in the bytes of a JSON file; see `object_in`."""
    try:
        return parse_json(
            data, unique_keys=kind.unique_keys, finite=kind.finite, whole_characters=kind.whole_characters
        )
    except UnicodeDecodeError as error:
        raise kind.wrong(f"is not UTF-8 text (byte {error.start})", path) from error
    except NotJsonError as error:
        raise kind.wrong(f"is not JSON: {error}", path) from error


def decode(data: bytes) -> str:
    """UTF-8 bytes as text, without a byte order mark.

    Raises:
        UnicodeDecodeError: they are not UTF-8.
    """
    return str(memoryview(data)[len(_BYTE_ORDER_MARK) :] if data.startswith(_BYTE_ORDER_MARK) else data, "utf-8")


def parse_json(
    text: str | bytes, *, unique_keys: bool = False, finite: bool = False, whole_characters: bool = False
) -> Any:
    """`json.loads` in bounded memory, and with one error for everything that can be wrong.

    Args:
        text: JSON; bytes are UTF-8, with or without a byte order mark.
        unique_keys, finite, whole_characters: see `FileKind`.

    Raises:
        NotJsonError: it is not JSON, is nested too deep, or has too many values or digits.
        UnicodeDecodeError: the bytes are not UTF-8.
    """
    text = decode(text) if isinstance(text, bytes) else text
    if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        raise NotJsonError(f"more than {MAX_VALUES} values")
    hooks: dict[str, Any] = {}
    if unique_keys:
        hooks["object_pairs_hook"] = _unique
    if finite:
        hooks |= {"parse_constant": _constant, "parse_float": _fraction}
    if _LONG_NUMBER.search(text):
        hooks["parse_int"] = _whole
    try:
        value = json.loads(text, **hooks)
    except NotJsonError:
        raise
    except json.JSONDecodeError as error:
        raise NotJsonError(error.msg, error.lineno, error.colno, at=error.pos) from error
    except RecursionError as error:
        raise NotJsonError("nested too deep") from error
    if whole_characters and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise NotJsonError("it holds half a surrogate pair (an escape \\ud8.. or \\udc.. alone)") from error
    return value


def with_whole_characters(value: Any) -> Any:
    """A value of `parse_json` with U+FFFD in the place of halves of surrogate pairs, which no text file can hold."""
    if isinstance(value, str):
        return _HALF_PAIR.sub("\ufffd", value)
    if isinstance(value, list):
        return [with_whole_characters(one) for one in value]
    if isinstance(value, dict):
        return {with_whole_characters(key): with_whole_characters(one) for key, one in value.items()}
    return value


def expand(path: str | Path) -> Path:
    """A path with `~` and `~user` replaced by the home; unchanged where there is no such home."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):  # ValueError: NUL or half a surrogate pair in the user's name
        return Path(path)


def exists(path: str | Path) -> bool:
    """Whether something is there; False, not an error, for a path that leads nowhere or that no file can have."""
    return os.path.exists(path)


def is_file(path: str | Path) -> bool:
    """Whether a regular file is there; see `exists`."""
    return os.path.isfile(path)


def is_dir(path: str | Path) -> bool:
    """Whether a directory is there; see `exists`."""
    return os.path.isdir(path)


def why_absent(path: str | Path) -> str | None:
    """Why a path leads to no file and no directory, to follow the path and a colon; None where it leads to one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return NOWHERE
    except OSError as error:
        return error.strerror
    except ValueError:
        return IMPOSSIBLE
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return f"it is {_kind_of(mode)}, neither a file nor a directory"


def text_kind(option: str) -> FileKind:
    """The kind of a UTF-8 text that a user names with an option or a key of a recipe."""
    return FileKind(error=UsageError, expected="a UTF-8 text", next_step=f"check {option}", limit_bytes=TEXT_BYTES)


def refuse_output(path: str | Path, option: str) -> None:
    """See that a file can be written at a path, before the work whose result it is to hold.

    Raises:
        UsageError: its directory is not there or not to be written to, a directory has its name, or it is no possible
            path.
    """
    what = why_impossible(path)
    if what is None and not is_dir(Path(path).absolute().parent):
        what = "its directory does not exist"
    if what is None and is_dir(path):
        what = "is a directory"
    if what is None:
        # A file is written beside the old one and renamed; devices and pipes are written to as they are.
        place = path if exists(path) and not is_file(path) else os.path.dirname(os.path.realpath(path))
        if not os.access(place, os.W_OK):
            what = "cannot be written: " + os.strerror(errno.EACCES)
    if what:
        raise UsageError(
            what, where=str(path)[:300], expected="the path of a file", next_step=f"name another with {option}"
        )


def why_impossible(path: str | Path) -> str | None:
    """Why nothing can be made at a path, whatever is there now; None where something can."""
    try:
        os.stat(path)
    except OSError as error:
        return error.strerror if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else None
    except ValueError:
        return IMPOSSIBLE
    return None


def _refuse_other_files(mode: int, path: str | Path, *, pipes: bool) -> None:
    """Raise for what is no regular file."""
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISFIFO(mode):
        anonymous = os.path.basename(os.path.realpath(path)).startswith("pipe:[")
        if anonymous and pipes:
            return
        if anonymous:
            raise OSError(errno.EINVAL, "it is a pipe, not a file")
    raise OSError(errno.EINVAL, f"it is {_kind_of(mode)}, not a file")


def _kind_of(mode: int) -> str:
    return next((name for is_kind, name in _OTHER_FILES if is_kind(mode)), "something else")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys occur once: which of two is meant cannot be known."""
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise NotJsonError(f"the key {counts.most_common(1)[0][0]!r} occurs twice")
    return found


def _whole(digits: str) -> int:
    count = len(digits.lstrip("-"))
    if count > MAX_DIGITS:
        raise NotJsonError(f"a number has {count} digits")
    return int(digits)


def _fraction(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise NotJsonError(f"{digits[:40]} is no finite number")
    return value


def _constant(name: str) -> float:
    raise NotJsonError(f"{name} is no finite number")
