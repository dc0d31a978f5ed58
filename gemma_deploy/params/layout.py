"""Where each tensor lies in the parameter file: the safetensors layout, known before the first byte is written.

float32 tensors first, then 16-bit, then int8, so that each is aligned to its element without holes (which the format
forbids). The format has no signed 4-bit integers: pairs of them, the first in the low half as ONNX packs them, are
bytes [rows, columns / 2]. The header is padded with spaces so that the data start on a page.
Names are those of naming.py. A file for llama.cpp has another header (gguf.py).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from gemma_deploy.dtypes import BY_NAME, StoredDtype
from gemma_deploy.params import gguf
from gemma_deploy.params.naming import Placed, entries
from gemma_deploy.schemes import Naming

if TYPE_CHECKING:
    from gemma_deploy.params.plan import ParamSpec

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Layout:
    """Header, absolute offset by tensor name, and size of the file."""

    header: bytes
    offsets: dict[str, int]
    file_bytes: int


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its first byte in the file is `offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def lay_out(plan: Sequence[ParamSpec], naming: Naming = "own", *, front: bytes = b"") -> Layout:
    """Place the plan's tensors.

    Args:
        front: metadata that stand in front of them, of a file for llama.cpp (`gguf.pack`).
    """
    ordered = sorted(plan, key=lambda spec: -BY_NAME[spec.dtype].bits)
    aligned = gguf.ALIGNMENT if naming == "gguf" else 1
    header = gguf.header(ordered, front) if naming == "gguf" else _header(ordered, naming)
    offsets, end = {}, len(header)
    for spec in ordered:
        end = -(-end // aligned) * aligned
        offsets[spec.name] = end
        end += spec.nbytes
    return Layout(header, offsets, end)


def places(plan: Sequence[ParamSpec], naming: Naming = "own", *, front: bytes = b"") -> tuple[Place, ...]:
    """Every tensor of the plan and where it will lie, in the plan's order."""
    offsets = lay_out(plan, naming, front=front).offsets
    return tuple(Place(spec.name, spec.dtype, spec.shape, offsets[spec.name], spec.nbytes) for spec in plan)


def header_bytes(rows: Iterable[Placed], naming: Naming = "own") -> bytes | None:
    """The header a file with these tensors in this order must have; None when a dtype is unknown."""
    rows = list(rows)
    return _header(rows, naming) if all(row.dtype in get_args(StoredDtype) for row in rows) else None


def _header(ordered: Sequence[Placed], naming: Naming) -> bytes:
    """Everything in front of the first tensor that lies in the file: what follows from the others is there already."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, content, sizes = 0, b"", iter(ordered)
    for entry in entries(ordered, naming):
        size = next(sizes).nbytes if entry.content is None else len(entry.content)
        content += entry.content or b""
        shape, end = list(entry.shape), end + size
        header[entry.name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [end - size, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + len(content) + 8) % PAGE_BYTES)
    return struct.pack("<Q", len(text)) + text + content
