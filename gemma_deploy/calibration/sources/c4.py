"""C4: one JSON object a line with `text`, `timestamp` and `url`, gzipped (c4-train.00000-of-01024.json.gz)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from gemma_deploy.calibration.sources.reading import Row, explained, parse_json, string_fields, wrong
from gemma_deploy.reading import open_regular

KEYS = ("text",)
EXPECTED = 'gzipped lines such as {"text": "...", "timestamp": "...", "url": "..."}'
LONGEST_LINE_BYTES = 16 << 20
# What a small file may unpack to. Text packs to a third; a megabyte of deflate can hold a gigabyte of line ends.
MOST_EMPTY_LINES, MOST_TIMES, ANYWAY_BYTES = 100_000, 100, 16 << 20
GZIP_MAGIC = b"\x1f\x8b"


def rows(path: Path) -> Iterator[Row]:
    """Yield every line; empty ones are left out. The same lines without gzip are read as well.

    Raises:
        CalibrationError: naming the line.
    """
    number = empty = unpacked = 0
    with explained(path, EXPECTED), _open(path) as file:
        most = max(ANYWAY_BYTES, MOST_TIMES * path.stat().st_size)
        while True:
            try:
                line = file.readline(LONGEST_LINE_BYTES + 1)
            except EOFError as error:
                raise wrong(
                    f"the gzip stream is cut short after line {number}", path, expected="a whole .json.gz file"
                ) from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise wrong(
                    f"the gzip stream is damaged after line {number}: {error}", path, expected=EXPECTED
                ) from error
            if not line:
                return
            number, unpacked = number + 1, unpacked + len(line)
            at = f"line {number}"
            if unpacked > most:
                raise wrong(f"unpacks to more than {MOST_TIMES} times its size", path, expected=EXPECTED)
            if len(line) > LONGEST_LINE_BYTES:
                raise wrong(f"is longer than {LONGEST_LINE_BYTES >> 20} MiB", path, at, expected=EXPECTED)
            empty += 1
            if empty > MOST_EMPTY_LINES:
                raise wrong(f"holds no text, as {MOST_EMPTY_LINES} lines before it", path, at, expected=EXPECTED)
            if not line.strip():
                continue
            entry = parse_json(line.rstrip(), path, at, expected=EXPECTED)
            problem = string_fields(entry, KEYS)
            if problem:
                raise wrong(problem, path, at, expected=EXPECTED)
            if entry["text"].strip():
                empty = 0
                yield entry


def text(row: Row) -> str:
    """The document of a row."""
    return str(row["text"])


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with open_regular(path) as file:
        zipped = file.read(2) == GZIP_MAGIC
        file.seek(0)
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if zipped else file
