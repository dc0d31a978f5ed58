"""One .safetensors file: its header checked by us, its tensors read as row blocks through a memory map.

The safetensors library is not used here because its mapping keeps every page it touched resident. The checks are
the library's own rules: contiguous offsets from zero to the end of the file, lengths that match dtype and shape.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.checkpoint.mapped import PIECE_BYTES, MappedFile
from gemma_deploy.dtypes import BY_NAME, BY_SAFETENSORS
from gemma_deploy.errors import CheckpointError
from gemma_deploy.reading import parse_json

HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own limit
READABLE = ("float32", "float16", "bfloat16", "float64")  # as rows of float32
AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class Entry:
    """One tensor of one file; start and stop are absolute byte offsets."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int


class SafetensorsFile:
    """Checked header and lazy rows of one file."""

    def __init__(self, path: Path) -> None:
        """Read and check the header."""
        self.path = path
        self.file = MappedFile(path)
        self.header_bytes = _header_length(self.file)
        self.entries = _entries(self.file, self.header_bytes)

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows in the source's own dtype; bfloat16 as uint16."""
        entry = self.entries[name]
        first, last, shape = _span(entry, start, stop)
        return self.file.copy(first, last, BY_NAME[entry.dtype].numpy).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows as float32, [stop - start, cols]; no intermediate copy of the block."""
        entry = self.entries[name]
        first, last, shape = _span(entry, start, stop)
        return self._floats(entry, first, last).reshape(shape)

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Columns [start, stop) of a matrix as float32, [rows, stop - start]; meant for few rows."""
        entry = self.entries[name]
        count, width = entry.shape
        if not 0 <= start <= stop <= width:
            raise IndexError(f"{name}: columns {start}..{stop} of {width}")
        size = BY_NAME[entry.dtype].itemsize
        out = np.empty((count, stop - start), np.float32)
        for row in range(count):
            first = entry.start + row * width * size
            out[row] = self._floats(entry, first + start * size, first + stop * size)
        return out

    def raw_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Columns [start, stop) of a matrix as stored, [rows, stop - start]; a few MiB of rows are mapped at a time."""
        entry = self.entries[name]
        count, width = entry.shape
        if not 0 <= start <= stop <= width:
            raise IndexError(f"{name}: columns {start}..{stop} of {width}")
        kind = np.dtype(BY_NAME[entry.dtype].numpy)
        out, row_bytes = np.empty((count, stop - start), kind), width * kind.itemsize
        step = max(1, PIECE_BYTES // max(row_bytes, 1))
        for top in range(0, count, step):
            bottom = min(top + step, count)
            first, last = entry.start + top * row_bytes, entry.start + bottom * row_bytes
            out[top:bottom] = self.file.view(first, last, kind).reshape(bottom - top, width)[:, start:stop]
            self.file.release(first, last)
        return out

    def float_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same columns of floats, as float32."""
        found = self.raw_columns(name, start, stop)
        if self.entries[name].dtype == "bfloat16":
            return np.left_shift(found, 16, dtype=np.uint32).view(np.float32)
        with np.errstate(over="ignore"):
            return found.astype(np.float32)

    def _floats(self, entry: Entry, first: int, last: int) -> np.ndarray:
        """The elements in bytes [first, last) of the file as float32."""
        kind = np.dtype(BY_NAME[entry.dtype].numpy)
        out = np.empty((last - first) // kind.itemsize, np.float32)
        for at, piece in self.file.pieces(first, last, kind):
            block = out[at : at + piece.size]
            if entry.dtype == "bfloat16":
                np.left_shift(piece, 16, out=block.view(np.uint32), dtype=np.uint32)
            else:
                with np.errstate(over="ignore"):
                    np.copyto(block, piece, casting="same_kind")
        return out


def _span(entry: Entry, start: int, stop: int) -> tuple[int, int, tuple[int, ...]]:
    """Bytes and shape of rows; of more than two dimensions those of all matrices below each other."""
    rows = math.prod(entry.shape[:-1]) if len(entry.shape) > 2 else entry.shape[0]
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"{entry.name}: rows {start}..{stop} of {rows}")
    row_bytes = (entry.stop - entry.start) // max(rows, 1)
    shape = (stop - start, *entry.shape[1:]) if len(entry.shape) < 3 else (stop - start, entry.shape[-1])
    return entry.start + start * row_bytes, entry.start + stop * row_bytes, shape


def _header_length(file: MappedFile) -> int:
    where = str(file.path)
    if file.size < 8:
        raise CheckpointError(f"has {file.size} bytes, too few for a safetensors file", where=where, next_step=AGAIN)
    (length,) = struct.unpack("<Q", file.copy(0, 8).tobytes())
    if length > HEADER_LIMIT_BYTES or length > file.size - 8:
        raise CheckpointError(
            f"says its header is {length} bytes long, but the file has {file.size}: cut short, or not safetensors",
            where=where,
            expected=f"a header of at most {min(HEADER_LIMIT_BYTES, file.size - 8)} bytes",
            next_step=AGAIN,
        )
    return int(length)


def _parse_header(file: MappedFile, length: int) -> dict[str, Any]:
    where = str(file.path)
    try:
        header = parse_json(file.copy(8, 8 + length).tobytes(), unique_keys=True)
    except ValueError as error:  # UnicodeDecodeError and NotJsonError are ValueErrors
        raise CheckpointError(f"the header is no JSON object: {error}", where=where, next_step=AGAIN) from error
    if not isinstance(header, dict) or not isinstance(header.pop("__metadata__", {}), dict):
        raise CheckpointError("the header is no JSON object of tensors", where=where, next_step=AGAIN)
    return header


def _entries(file: MappedFile, length: int) -> dict[str, Entry]:
    data_start, data_size = 8 + length, file.size - 8 - length
    header = _parse_header(file, length)
    problems: list[str] = []
    entries = [entry for name, info in header.items() if (entry := _entry(name, info, data_start, data_size, problems))]
    if not problems:
        problems += _layout_problems(entries, data_start, data_size)
    if problems:
        raise CheckpointError(
            f"{len(problems)} wrong entries in the header",
            where=str(file.path),
            problems=problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []),
            next_step=AGAIN,
        )
    return {entry.name: entry for entry in entries}


def _entry(name: str, info: object, data_start: int, data_size: int, problems: list[str]) -> Entry | None:
    """One header entry, or None with the reason appended to `problems`."""
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        problems.append(f"{name}: dtype, shape and data_offsets are needed")
        return None
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        problems.append(f"{name}: unknown dtype {str(dtype)[:40]!r}")
        return None
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        problems.append(f"{name}: shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]} must be whole numbers")
        return None
    kind, width = BY_SAFETENSORS[dtype].name, BY_SAFETENSORS[dtype].itemsize
    start, stop = offsets
    if not start <= stop <= data_size:
        problems.append(f"{name}: offsets {start}..{stop} lie outside the file's {data_size} data bytes (cut short?)")
        return None
    if stop - start != math.prod(shape) * width:
        problems.append(f"{name}: {stop - start} bytes stored, {dtype} {shape} needs {math.prod(shape) * width}")
        return None
    return Entry(name, tuple(shape), kind, data_start + start, data_start + stop)


def _whole_numbers(value: object) -> bool:
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(type(item) is int and 0 <= item < 2**62 for item in value)


def _layout_problems(entries: list[Entry], data_start: int, data_size: int) -> list[str]:
    problems, end, before = [], data_start, "the header"
    for entry in sorted(entries, key=lambda e: (e.start, e.stop)):
        if entry.start < end:
            problems.append(f"{entry.name}: overlaps {before} by {end - entry.start} bytes")
        elif entry.start > end:
            problems.append(f"{entry.name}: {entry.start - end} unexplained bytes between it and {before}")
        end, before = max(end, entry.stop), entry.name
    if end != data_start + data_size:
        problems.append(f"{data_start + data_size - end} unexplained bytes after the last tensor ({before})")
    return problems


def readable(dtype: str) -> bool:
    """Whether rows of this dtype can become float32."""
    return dtype in READABLE
