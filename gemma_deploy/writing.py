"""Files that are there whole or not at all, whenever the program or the machine stops.

A file is written under a temporary name beside it, brought to the disk, and renamed. Whole directories: workdir.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
_TEMPORARY = ".gemma-deploy-"  # begins temporary names
HALF_PAIR = re.compile("[\ud800-\udfff]")  # of surrogates: JSON holds it as an escape only
MOST_LINKS = 40  # the system follows no more


def sync_tree(folder: Path) -> None:
    """Wait until the regular files and directories in `folder` are on the disk, and itself."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if stat.S_ISREG(os.lstat(os.path.join(place, name)).st_mode):
                sync(Path(place, name))
        sync(Path(place))


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems cannot do it for directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A temporary path to write a file to; when its content is on the disk, it takes the place of `file`.

    Raises:
        OSError: the disk refuses; nothing is left, and `file` is as it was.
    """
    name = zlib.crc32(os.fsencode(file.name))  # not the name itself, which may be as long as names can be
    partial = file.with_name(f"{_TEMPORARY}{os.getpid()}-{name:08x}{PARTIAL}")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        yield partial
        sync(partial)
        partial.replace(file)
        sync(file.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of runs that were killed while they wrote; nobody else may be writing there."""
    for file in folder.rglob(f"{_TEMPORARY}*{PARTIAL}"):
        file.unlink()


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all; a pipe, a device or this process's own output gets the content directly.

    Raises:
        OSError: the disk refuses.
    """
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    fd = _open_number(file)
    if fd is not None:
        fd = os.dup(fd)  # opened by its name it would have a position of its own
    elif file.exists() and not file.is_file():
        fd = os.open(file, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        os.set_blocking(fd, True)
    if fd is not None:
        with os.fdopen(fd, "wb") as opened:
            opened.write(content)
        return
    with whole_file(Path(os.path.realpath(file))) as partial:
        partial.write_bytes(content)


def write_text(file: Path, text: str) -> None:
    r"""Write text as UTF-8, as `write_bytes` does; half a surrogate pair is written as \udXXX."""
    write_bytes(file, text.encode("utf-8", "backslashreplace"))


def write_json(
    file: Path, value: Any, *, indent: int | None = 1, sort_keys: bool = True, ensure_ascii: bool = True
) -> None:
    """Write plain JSON values, as `write_bytes` does.

    Raises:
        ValueError: see `json_text`. OSError: the disk refuses.
    """
    try:
        text = json_text(value, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    write_bytes(file, text.encode("utf-8"))


def json_text(value: Any, *, indent: int | None = 1, sort_keys: bool = True, ensure_ascii: bool = True) -> str:
    """Plain JSON values as text that ends with a line break and can be written as UTF-8.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold (see `finite`).
    """
    try:
        text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError as error:
        raise ValueError(", ".join(_not_finite(value)) or str(error)) from error
    return HALF_PAIR.sub(lambda half: f"\\u{ord(half[0]):04x}", text) + "\n"


def finite(value: Any) -> Any:
    """JSON values with None in the place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_finite(value: Any, place: str = "") -> Iterator[str]:
    """Where in JSON values a number is NaN or infinite."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in pairs:
            yield from _not_finite(one, f"{place}.{key}" if place else str(key))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place or 'the value'} is {value}"


def _open_number(file: Path) -> int | None:
    """The number of the open file of this process that a name such as /dev/stdout leads to."""
    own = re.compile(rf"/proc/{os.getpid()}(/task/\d+)?/fd")
    for _ in range(MOST_LINKS):
        if own.fullmatch(os.path.realpath(file.parent)) and file.name.isdigit() and file.exists():
            return int(file.name)
        if not file.is_symlink():
            return None
        file = file.parent / os.readlink(file)
    return None
