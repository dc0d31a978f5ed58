"""What was written where: one row per tensor of the parameter file, as the manifest carries it.

Also the deep check of a file against its rows; the header needs no row because it follows from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gemma_deploy.bounds import Bytes, Inside, Size
from gemma_deploy.dtypes import DtypeName
from gemma_deploy.names import PARAMS
from gemma_deploy.params import gguf
from gemma_deploy.params.layout import header_bytes
from gemma_deploy.schemes import Naming

HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ParamRow:
    """One tensor.

    Args:
        offset: absolute in the file.
        sqnr_db: of quantized weights; None where nothing was rounded away. Where a rank holds some columns: of whole
            rows.
        file: the parameter file, relative to the artifact.
        signal_energy: sum of squares of what was quantized, so that errors of several tensors can be added up.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[^.].*\.")]
    dtype: DtypeName
    shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=8)]
    offset: Bytes
    nbytes: Bytes
    sha256: str
    scheme: str
    sqnr_db: float | None = None
    signal_energy: float | None = None
    file: Inside = PARAMS


@dataclass(frozen=True)
class ParamTable:
    """All rows in the order of the file."""

    rows: tuple[ParamRow, ...]

    def __getitem__(self, name: str) -> ParamRow:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def files(self) -> dict[str, ParamTable]:
        """The table of each parameter file; one but for a divided artifact."""
        found: dict[str, list[ParamRow]] = {}
        for row in self.rows:
            found.setdefault(row.file, []).append(row)
        return {file: ParamTable(tuple(rows)) for file, rows in found.items()}

    def moved(self, file: str) -> ParamTable:
        """The same rows in another file."""
        return ParamTable(tuple(replace(row, file=file) for row in self.rows))

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.rows[-1].offset + self.rows[-1].nbytes

    @property
    def digest(self) -> str:
        """One sha256 that stands for every byte of the file: over the table, which holds each tensor's."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as the manifest has them."""
        return [asdict(row) | {"shape": list(row.shape)} for row in self.rows]

    @classmethod
    def from_json(cls, rows: Iterable[dict[str, Any]]) -> ParamTable:
        """The inverse of `to_json`."""
        return cls(tuple(row_from_json(row) for row in rows))


def lowest_sqnr(rows: Iterable[ParamRow]) -> ParamRow | None:
    """The quantized tensor that lost most; None where nothing is quantized."""
    measured = ((row.sqnr_db, row) for row in rows if row.sqnr_db is not None)
    return min(measured, key=lambda pair: pair[0], default=(0.0, None))[1]


def row_from_json(row: dict[str, Any]) -> ParamRow:
    """One row from its JSON form."""
    return ParamRow(**(row | {"shape": tuple(row["shape"])}))


def hash_span(path: Path, offset: int, nbytes: int) -> str:
    """Sha256 of a part of a file (shorter where the file ends early)."""
    digest, block = hashlib.sha256(), memoryview(bytearray(HASH_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while nbytes > 0 and (count := file.readinto(block[: min(nbytes, HASH_BLOCK_BYTES)])):
            digest.update(block[:count])
            nbytes -= count
    return digest.hexdigest()


def damaged_rows(
    path: Path,
    table: ParamTable,
    *,
    naming: Naming = "own",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Read the whole file and say what differs from the table: nothing, when it is sound.

    Args:
        path: the parameter file.
        table: its rows; naming: what tensors are called in the file.
        workers: threads.
        progress: called with (bytes checked, bytes in all) after each tensor.
    """
    size = path.stat().st_size
    problems = [] if size == table.file_bytes else [f"{path.name} has {size} bytes, expected {table.file_bytes}"]
    if not (_gguf_header_matches(path, table) if naming == "gguf" else _header_matches(path, table, naming)):
        problems.append(f"{path.name}: the header differs from the parameter table")
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        hashes = pool.map(lambda row: hash_span(path, row.offset, row.nbytes), table.rows)
        for row, found in zip(table.rows, hashes, strict=True):
            if found != row.sha256:
                problems.append(f"{row.name}: sha256 is {found[:16]}.. in {path.name}, expected {row.sha256[:16]}..")
            done += row.nbytes
            if progress:
                progress(done, table.file_bytes)
    return problems


def _header_matches(path: Path, table: ParamTable, naming: Naming) -> bool:
    header = header_bytes(table.rows, naming)
    return header is not None and hash_span(path, 0, len(header)) == hashlib.sha256(header).hexdigest()


def _gguf_header_matches(path: Path, table: ParamTable) -> bool:
    """What stands around metadata, which have a row, follows from the other rows; so do zeros between tensors."""
    ahead, *rows = table.rows
    with open(path, "rb", buffering=0) as file:
        front = os.pread(file.fileno(), ahead.nbytes, ahead.offset)
        if ahead.scheme != gguf.FRONT_KIND or hashlib.sha256(front).hexdigest() != ahead.sha256:
            return True  # that is told of the row
        expected = gguf.header(rows, front)
        if os.pread(file.fileno(), len(expected), 0) != expected or rows[0].offset != len(expected):
            return False
        ends = [row.offset + row.nbytes for row in rows[:-1]]
        gaps = [(end, row.offset) for end, row in zip(ends, rows[1:], strict=True)]
        return all(
            stop == gguf.aligned(start) and not any(os.pread(file.fileno(), stop - start, start))
            for start, stop in gaps
        )


def in_file_order(rows: Sequence[ParamRow]) -> ParamTable:
    """The table of rows that were finished in any order."""
    return ParamTable(tuple(sorted(rows, key=lambda row: row.offset)))
