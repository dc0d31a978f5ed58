"""What tensors are called in the header of the parameter file: as here, or as another program's loader wants them.

Bytes are the same: codes of 8 or 4 bits with a zero point in the middle of their range lie as compressed-tensors packs
them into int32, the first in the lowest bits (its `pack_to_int32`), and signed codes of 8 bits as its `int-quantized`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.names import GGUF, OPENVINO_WEIGHTS, PARAMS
from gemma_deploy.schemes import Naming

WORD = 32  # bits of an element of packed codes
CONSTANTS = "openvino.constants"  # bytes in front of the tensors, where a graph finds its small constants


@dataclass(frozen=True)
class Entry:
    """One tensor of the header.

    Args:
        dtype: safetensors' name of it.
        content: what it holds, where that follows from the other tensors; else it lies in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes | None = None


class Placed(Protocol):
    """What the header needs to know of a tensor."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def dtype(self) -> str: ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def nbytes(self) -> int: ...  # noqa: D102


def file_name(naming: Naming) -> str:
    """The parameter file of a part."""
    return {"gguf": GGUF, "openvino": OPENVINO_WEIGHTS}.get(naming, PARAMS)


def graph_file(graph: str, naming: Naming) -> str:
    """The file of a graph, by its name."""
    return f"{graph}.xml" if naming == "openvino" else f"{graph}.onnx"


def entries(tensors: Sequence[Placed], naming: Naming) -> Iterator[Entry]:
    """Those of a file: what follows from other tensors first, then the tensors in their order."""
    made = [_entry(one, naming) for one in tensors]
    if naming == "compressed-tensors":
        for one, entry in zip(tensors, made, strict=True):
            if entry.name.endswith(".weight_packed"):
                name = entry.name.replace(".weight_packed", ".weight_shape")
                yield Entry(name, "I64", (len(one.shape),), struct.pack(f"<{len(one.shape)}q", *one.shape))
    yield from made


def index_of(files: Mapping[str, Sequence[Placed]], naming: Naming) -> dict[str, object]:
    """What `model.safetensors.index.json` says: in which file each tensor lies.

    Args:
        files: tensors of each parameter file, by its name.
    """
    places, size = dict[str, str](), sum(one.nbytes for tensors in files.values() for one in tensors)
    for file, tensors in files.items():
        for entry in entries(tensors, naming):
            places[entry.name] = file
            size += len(entry.content or b"")
    return {"metadata": {"total_size": size}, "weight_map": places}


def _entry(one: Placed, naming: Naming) -> Entry:
    dtype = BY_NAME[one.dtype]
    if naming == "compressed-tensors":
        if one.name.endswith(".scale"):
            groups = one.shape if len(one.shape) > 1 else (*one.shape, 1)
            return Entry(one.name.removesuffix("scale") + "weight_scale", dtype.safetensors, groups)
        if one.dtype in ("uint8", "uint4"):
            words = (*one.shape[:-1], one.shape[-1] * dtype.bits // WORD)
            return Entry(f"{one.name}_packed", "I32", words)
    shape = (*one.shape[:-1], one.shape[-1] // 2) if dtype.packed else one.shape
    return Entry(one.name, dtype.safetensors, shape)
