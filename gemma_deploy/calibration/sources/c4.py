"""C4: one JSON object a line with `text`, `timestamp` and `url`, gzipped (c4-train.00000-of-01024.json.gz)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from gemma_deploy.calibration.sources.reading import Row, explained, parse_json, string_fields, wrong

KEYS = ("text",)
EXPECTED = 'gzipped lines such as {"text": "...", "timestamp": "...", "url": "..."}'
LONGEST_LINE_BYTES = 64 << 20
GZIP_MAGIC = b"\x1f\x8b"


def rows(path: Path) -> Iterator[Row]:
    """Yield every line; empty ones are left out. The same lines without gzip are read as well.

    Raises:
        CalibrationError: naming the line.
    """
    number = 0
    with explained(path, EXPECTED), _open(path) as file:
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
            number += 1
            at = f"line {number}"
            if len(line) > LONGEST_LINE_BYTES:
                raise wrong(f"is longer than {LONGEST_LINE_BYTES >> 20} MiB", path, at, expected=EXPECTED)
            if not line.strip():
                continue
            entry = parse_json(line.rstrip(), path, at, expected=EXPECTED)
            problem = string_fields(entry, KEYS)
            if problem:
                raise wrong(problem, path, at, expected=EXPECTED)
            if entry["text"].strip():
                yield entry


def text(row: Row) -> str:
    """The document."""
    return str(row["text"])


def _open(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        zipped = file.read(2) == GZIP_MAGIC
    return cast(IO[bytes], gzip.open(path, "rb")) if zipped else open(path, "rb")
