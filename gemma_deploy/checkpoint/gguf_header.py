"""The header of a .gguf file: metadata and tensor table, bounds-checked.

The gguf package's own reader keeps several NumPy objects per vocabulary entry (hundreds of MB for Gemma's 262144) and
fails on a cut file with errors of NumPy; its tables of block sizes and its dequantizers are used (gguf_reader.py).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from gemma_deploy.checkpoint.mapped import MappedFile
from gemma_deploy.errors import CheckpointError

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_NAME_BYTES, MAX_ENTRIES = 65535, 1_000_000
MAX_ARRAY, MAX_ARRAY_BYTES = 1 << 21, 64 << 20  # of an array that is read whole; Gemma's vocabulary has 262,144 entries
WINDOW_BYTES = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table; dims as stored (fastest first), offset from the start of the data."""

    name: str
    dims: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Scalar and string metadata (long arrays: only their length), the tensor table, and where the data start."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int


def read_gguf_header(file: MappedFile, whole: Container[str] = ()) -> GgufHeader:
    """Parse and check; any damage is a CheckpointError naming the file and the byte.

    Args:
        file: the open file.
        whole: keys of arrays that are read to their end, however long; of the others only the length is kept.
    """
    cursor = _Cursor(file)
    if file.size < 24 or cursor.take(4) != b"GGUF":
        raise CheckpointError(
            "is no GGUF file (the first four bytes are not GGUF)",
            where=str(file.path),
            next_step="pass a .gguf file or a directory of safetensors",
        )
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise CheckpointError(
            f"is GGUF version {version & 0xFFFF or version}",
            where=str(file.path),
            expected="version 2 or 3, little-endian",
            next_step="convert it with a current llama.cpp",
        )
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    if max(tensor_count, key_count) > MAX_ENTRIES:
        raise cursor.damaged(f"{tensor_count} tensors and {key_count} keys are announced")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string(MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.damaged(f"the key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I"), whole=key in whole)
    tensors = tuple(_tensor(cursor) for _ in range(tensor_count))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise cursor.damaged("a tensor name occurs twice")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment}, expected a power of two")
    cursor.finish()
    return GgufHeader(metadata, tensors, -(-cursor.at // alignment) * alignment)


def _tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.string(MAX_NAME_BYTES)
    dim_count = cursor.scalar("I")
    if dim_count > 4:
        raise cursor.damaged(f"tensor {name!r} has {dim_count} dimensions")
    dims = tuple(cursor.scalar("Q") for _ in range(dim_count))
    if math.prod(dims) >= 2**62:
        raise cursor.damaged(f"tensor {name!r} has the shape {list(dims)}")
    return GgufTensor(name, dims, cursor.scalar("I"), cursor.scalar("Q"))


class _Cursor:
    """Reads forward through one window at a time and gives its pages back."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.at = file, 0
        self._start, self._window = 0, b""

    def take(self, count: int) -> bytes:
        if count > self.file.size - self.at:
            raise self.damaged(f"{count} more bytes are announced, {self.file.size - self.at} are there")
        begin = self.at - self._start
        if begin + count > len(self._window):
            stop = min(self.file.size, self.at + max(count, WINDOW_BYTES))
            self._start, begin = self.at, 0
            self._window = self.file.copy(self.at, stop).tobytes()
        self.at += count
        return self._window[begin : begin + count]

    def skip(self, count: int) -> None:
        if count > self.file.size - self.at:
            raise self.damaged(f"{count} more bytes are announced, {self.file.size - self.at} are there")
        self.at += count
        if self.at - self._start > len(self._window):
            self._start, self._window = self.at, b""

    def finish(self) -> None:
        self._window = b""

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, self.take(size))[0]

    def string(self, limit: int) -> str:
        length = self.scalar("Q")
        if length > limit:
            raise self.damaged(f"a string of {length} bytes is announced")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a string is not UTF-8: {error}") from error

    def value(self, kind: int, *, whole: bool = False) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string(self.file.size)
        if kind != ARRAY:
            raise self.damaged(f"value type {kind} is unknown")
        return self._array(whole)

    def _array(self, whole: bool) -> Any:
        """Short number arrays as lists (per-layer settings); long ones and strings as their length."""
        kind, count = self.scalar("I"), self.scalar("Q")
        if whole and (kind in SCALARS or kind == STRING):
            return self._whole(kind, count)
        if kind in SCALARS:
            code = SCALARS[kind]
            if count <= 4096:
                return [self.scalar(code) for _ in range(count)]
            self.skip(count * struct.calcsize("<" + code))
        elif kind == STRING:
            if count > self.file.size // 8:
                raise self.damaged(f"an array of {count} strings is announced")
            for _ in range(count):
                self.skip(self.scalar("Q"))
        else:
            raise self.damaged(f"an array of type {kind} is not supported")
        return ("array", count)

    def _whole(self, kind: int, count: int) -> list[Any]:
        """Every value of an array of numbers or strings."""
        if count > MAX_ARRAY:
            raise self.damaged(f"an array of {count} values is announced; at most {MAX_ARRAY} are read")
        if kind in SCALARS:
            form = f"<{count}{SCALARS[kind]}"
            return list(struct.unpack(form, self.take(struct.calcsize(form))))
        start, values = self.at, []
        for _ in range(count):
            values.append(self.string(MAX_NAME_BYTES))
            if self.at - start > MAX_ARRAY_BYTES:
                raise self.damaged(f"an array of strings has more than {MAX_ARRAY_BYTES} bytes")
        return values

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"the GGUF header is damaged or cut short at byte {self.at}: {what}",
            where=str(self.file.path),
            next_step="copy or download the file again",
        )
