"""What stands around the tensors of a parameter file for llama.cpp: metadata, and the table of its tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3. The metadata are bytes of their own (the
`front`), known before the first tensor is written, with a row in the table of parameters. The gguf package's writer
makes a header only together with a whole file of its own, and keeps several objects for each of 262,144 tokens.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gemma_deploy import architectures
from gemma_deploy.architectures import Gguf
from gemma_deploy.dtypes import BY_NAME

if TYPE_CHECKING:
    from gemma_deploy.params.naming import Placed

Value = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]
MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
# ggml's numbers of types.
TENSOR_TYPES = {"float32": 0, "float16": 1, "q4_0": 2, "q8_0": 8, "bfloat16": 30}
STRING, ARRAY, UNSIGNED, SIGNED, FLOAT, BOOLEAN = 8, 9, 4, 5, 6, 7
ARCHITECTURE = "general.architecture"
FRONT_OFFSET = 16  # behind magic, version and number of tensors
FRONT_NAME, FRONT_KIND = "general.metadata", "metadata"  # of its row


def pack(metadata: Mapping[str, Value]) -> bytes:
    """Keys and values, their number in front. `ARCHITECTURE` comes first."""
    ordered = {ARCHITECTURE: metadata[ARCHITECTURE], **metadata}
    return struct.pack("<Q", len(ordered)) + b"".join(_text(key) + _value(value) for key, value in ordered.items())


def header(ordered: Sequence[Placed], front: bytes) -> bytes:
    """Everything in front of the first tensor.

    Args:
        ordered: the tensors, as they follow each other; front: the metadata (`pack`).
    """
    row, end, table = _layout(front), 0, b""
    for one in ordered:
        end = aligned(end)
        dims = tuple(reversed(one.shape))
        table += _text(row.own_name(one.name)) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        table += struct.pack("<IQ", TENSOR_TYPES[one.dtype], end)
        end += BY_NAME[one.dtype].nbytes(math.prod(one.shape))
    made = MAGIC + struct.pack("<IQ", VERSION, len(ordered)) + front + table
    return made + bytes(aligned(len(made)) - len(made))


def aligned(offset: int) -> int:
    """The next place where a tensor may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _layout(front: bytes) -> Gguf:
    """How llama.cpp names tensors of the model that metadata are of."""
    at = 8 + len(_text(ARCHITECTURE)) + 4
    (size,) = struct.unpack_from("<Q", front, at)
    return architectures.by_gguf_name()[front[at + 8 : at + 8 + size].decode()][1]


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """The number of its type, and the value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool | int | float):
        kind, code = (BOOLEAN, "?") if isinstance(value, bool) else _number(value, UNSIGNED)
        return struct.pack(f"<I{code}", kind, value)
    count = struct.pack("<Q", len(value))
    if value and isinstance(value[0], str):
        return struct.pack("<II", ARRAY, STRING) + count + b"".join(_text(str(one)) for one in value)
    kind, code = (BOOLEAN, "?") if value and isinstance(value[0], bool) else _number(value[0] if value else 0, SIGNED)
    return struct.pack("<II", ARRAY, kind) + count + struct.pack(f"<{len(value)}{code}", *value)


def _number(value: object, whole: int) -> tuple[int, str]:
    return (FLOAT, "f") if isinstance(value, float) else (whole, "I" if whole == UNSIGNED else "i")
