"""Where each tensor lies in the parameter file: the safetensors layout, known before the first byte is written.

float32 tensors first, then 16-bit, then int8, so that each is aligned to its element without holes (which the format
forbids). The format has no signed 4-bit integers: pairs of them, the first in the low half as ONNX packs them, are
bytes [rows, columns / 2]. The header is padded with spaces so that the data start on a page.
Names are those of naming.py. A file for llama.cpp has another header (gguf.py); one for OpenVINO begins with a tensor
of bytes, in which its graph finds small constants.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from gemma_deploy.dtypes import BY_NAME, StoredDtype
from gemma_deploy.params import gguf
from gemma_deploy.params.naming import CONSTANTS, Placed, entries
from gemma_deploy.schemes import Naming

if TYPE_CHECKING:
    from gemma_deploy.params.plan import ParamSpec

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its first byte in the file is `offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Header, absolute offset by tensor name, and size of the file; `front` is where the bytes lie that are so called.

    The header holds these bytes.
    """

    header: bytes
    offsets: dict[str, int]
    file_bytes: int
    front: Place | None = None


def lay_out(plan: Sequence[ParamSpec], naming: Naming = "own", *, front: bytes = b"") -> Layout:
    """Place the plan's tensors.

    Args:
        front: what stands in front of them: metadata of a file for llama.cpp (`gguf.pack`), constants of one for
            OpenVINO.
    """
    ordered = sorted(plan, key=lambda spec: -BY_NAME[spec.dtype].bits)
    aligned, ahead = gguf.ALIGNMENT if naming == "gguf" else 1, None
    if naming == "gguf":
        header = gguf.header(ordered, front)
        ahead = Place(gguf.FRONT_NAME, "uint8", (len(front),), gguf.FRONT_OFFSET, len(front))
    elif front:
        ahead = Place(CONSTANTS, "uint8", (len(front),), 0, len(front))
        header = _header([ahead, *ordered], naming)
        ahead, header = replace(ahead, offset=len(header)), header + front
    else:
        header = _header(ordered, naming)
    offsets, end = {}, len(header)
    for spec in ordered:
        end = -(-end // aligned) * aligned
        offsets[spec.name] = end
        end += spec.nbytes
    return Layout(header, offsets, end, ahead)


def places(plan: Sequence[ParamSpec], naming: Naming = "own", *, front: bytes = b"") -> tuple[Place, ...]:
    """Every tensor of the plan and where it will lie, in the plan's order; in front of them what a graph reads too."""
    layout = lay_out(plan, naming, front=front)
    ahead = [layout.front] if layout.front is not None and layout.front.name == CONSTANTS else []
    placed = (Place(spec.name, spec.dtype, spec.shape, layout.offsets[spec.name], spec.nbytes) for spec in plan)
    return (*ahead, *placed)


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
