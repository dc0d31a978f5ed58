"""What is already on disk: one JSON line per finished job, so that a killed run continues.

The data of a job reach the disk before its line does. A torn last line is dropped. The first line carries a key over
everything the result depends on; another key means another file, and the journal starts afresh.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from gemma_deploy.errors import ParamsError
from gemma_deploy.params.table import ParamRow, row_from_json
from gemma_deploy.reading import is_file, parse_json

FORMAT = 1
_NEEDED = {"name", "dtype", "shape", "offset", "nbytes", "sha256", "scheme"}


class Journal:
    """An append-only file, locked against a second run as long as it is open (the lock dies with the process)."""

    def __init__(self, path: Path, key: str) -> None:
        """Open or create the journal and read what holds under this key."""
        self.path, self.key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise ParamsError(
                "another run is writing these parameters",
                where=str(path),
                next_step="wait for it to end, or give this run another workspace",
            ) from error
        records, self._end = _read(path, key)
        self.matched = self._end > 0
        self.finished = {r["job"]: [row_from_json(row) for row in r["rows"]] for r in records if "job" in r}
        self.file: dict[str, Any] | None = next((r["file"] for r in records if "file" in r), None)

    def start(self, afresh: bool) -> None:
        """Cut off what is torn, or everything, and make the key durable."""
        if afresh or not self.matched:
            self.finished, self.file, self._end = {}, None, 0
        os.ftruncate(self._fd, self._end)
        if self._end == 0:
            self._append([{"format": FORMAT, "key": self.key}])

    def finish_jobs(self, jobs: Iterable[tuple[str, list[ParamRow]]]) -> None:
        """Note jobs whose data are on disk."""
        self._append([{"job": name, "rows": [_row_json(row) for row in rows]} for name, rows in jobs])

    def finish_file(self, stat: os.stat_result) -> None:
        """Note that the whole file is on disk and what it looks like from outside."""
        self.file = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        self._append([{"file": self.file}])

    def close(self) -> None:
        """Close the file and let go of its lock."""
        os.close(self._fd)

    def _append(self, records: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        self._end += _write_all(self._fd, data, self._end)
        os.fdatasync(self._fd)


def read_finished(path: Path, key: str) -> tuple[list[ParamRow], dict[str, Any] | None]:
    """Rows and file record that hold under this key, without locking; nothing where there is no such journal."""
    records, _ = _read(path, key) if is_file(path) else ([], 0)
    rows = [row_from_json(row) for record in records for row in record.get("rows", ())]
    return rows, next((record["file"] for record in records if "file" in record), None)


def _read(path: Path, key: str) -> tuple[list[dict[str, Any]], int]:
    """Whole lines under this key and the byte where they end; nothing for another key."""
    records: list[dict[str, Any]] = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        record = _record(line)
        if record is None or (not records and record != {"format": FORMAT, "key": key}):
            break
        records.append(record)
        end += len(line)
    return records[1:], end


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is torn or says nothing that a run writes."""
    try:
        record = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:  # UnicodeDecodeError and NotJsonError are ValueErrors
        return None
    match record:
        case {"format": _, "key": str()}:
            return record
        case {"job": str(), "rows": list(rows)} if all(map(_is_row, rows)):
            return record
        case {"file": {"bytes": int(), "mtime_ns": int()}}:
            return record
    return None


def _is_row(row: object) -> bool:
    """Whether a value is a row as `_row_json` gives it."""
    if (
        not isinstance(row, dict)
        or row.keys() - {field.name for field in fields(ParamRow)}
        or not row.keys() >= _NEEDED
    ):
        return False
    whole = [row["offset"], row["nbytes"], *row["shape"]] if isinstance(row["shape"], list) else [None]
    texts = [row["name"], row["dtype"], row["sha256"], row["scheme"], row.get("file", "")]
    measured = [row.get("sqnr_db"), row.get("signal_energy")]
    return (
        all(type(one) is int and 0 <= one < 2**62 for one in whole)
        and all(isinstance(one, str) for one in texts)
        and all(one is None or type(one) in (int, float) for one in measured)
    )


def _row_json(row: ParamRow) -> dict[str, Any]:
    return vars(row) | {"shape": list(row.shape)}


def _write_all(fd: int, data: bytes, offset: int) -> int:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)
    return written
