"""Dtypes of tensors, in one table: what they are called here, by ONNX and by safetensors, and how large an element is.

The names here are NumPy's and ONNX's, in lower case. ONNX's numbers are those of `TensorProto.DataType`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Dtypes of tensors in a parameter file.
StoredDtype = Literal["float32", "float16", "bfloat16", "int8", "int4", "uint8", "uint4", "q8_0", "q4_0"]
# Those, and the dtypes of a graph's inputs and outputs.
DtypeName = Literal[
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "int4", "uint4", "bool",
    "q8_0", "q4_0",
]  # fmt: skip


@dataclass(frozen=True)
class Dtype:
    """One dtype.

    Args:
        name: here, in manifests and parameter tables.
        bits: of an element; elements of 4 bits lie in pairs, the first one in the low half of a byte.
        onnx: its number there.
        safetensors: its name there; of elements of 4 bits, which that format lacks, the name of their bytes.
        numpy: an array of the elements, or of their bits where NumPy has no such type; little-endian.
        block: bytes of a block of `BLOCK` codes and their scale (params/blocks.py); 0 of elements that lie alone.
    """

    name: str
    bits: int
    onnx: int
    safetensors: str
    numpy: str
    block: int = 0

    @property
    def packed(self) -> bool:
        """Whether two elements share a byte."""
        return self.bits == 4 and not self.block

    @property
    def itemsize(self) -> int:
        """Bytes of an element that is not packed."""
        return self.bits // 8

    def nbytes(self, count: int) -> int:
        """Bytes of so many elements."""
        return count // BLOCK * self.block if self.block else count * self.bits // 8

    @property
    def onnxruntime(self) -> str:
        """What a session of ONNX Runtime calls the type of an input or output."""
        return f"tensor({ {'float32': 'float', 'float64': 'double'}.get(self.name, self.name) })"


ROWS = (
    Dtype("float64", 64, 11, "F64", "<f8"),
    Dtype("float32", 32, 1, "F32", "<f4"),
    Dtype("float16", 16, 10, "F16", "<f2"),
    Dtype("bfloat16", 16, 16, "BF16", "<u2"),
    Dtype("float8_e4m3", 8, 17, "F8_E4M3", "u1"),
    Dtype("float8_e5m2", 8, 19, "F8_E5M2", "u1"),
    Dtype("int64", 64, 7, "I64", "<i8"),
    Dtype("int32", 32, 6, "I32", "<i4"),
    Dtype("int16", 16, 5, "I16", "<i2"),
    Dtype("int8", 8, 3, "I8", "i1"),
    Dtype("int4", 4, 22, "U8", "u1"),
    Dtype("uint64", 64, 13, "U64", "<u8"),
    Dtype("uint32", 32, 12, "U32", "<u4"),
    Dtype("uint16", 16, 4, "U16", "<u2"),
    Dtype("uint8", 8, 2, "U8", "u1"),
    Dtype("uint4", 4, 21, "U8", "u1"),
    Dtype("bool", 8, 9, "BOOL", "?"),
)
# Of llama.cpp: codes in runs of 32 columns, each behind its float16 scale.
BLOCK = 32
BLOCKS = (Dtype("q8_0", 8, 0, "", "u1", 34), Dtype("q4_0", 4, 0, "", "u1", 18))
# What OpenVINO calls some of them.
OPENVINO = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32", "i8": "int8",
    "u8": "uint8", "i4": "int4", "u4": "uint4", "boolean": "bool",
}  # fmt: skip
BY_NAME = {row.name: row for row in (*ROWS, *BLOCKS)}
BY_ONNX = {row.onnx: row for row in ROWS}
BY_ONNXRUNTIME = {row.onnxruntime: row for row in ROWS}
BY_SAFETENSORS = {row.safetensors: row for row in ROWS if not row.packed}
