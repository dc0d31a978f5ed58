"""compressed-tensors, as llm-compressor writes it: `pack-quantized` words, or `int-quantized` bytes.

`weight_packed` [out, in * bits / 32] holds codes plus half their range, so that they are unsigned; `weight` is int8.
Scales `weight_scale` are [out, groups], [out, 1], or [1] for the whole matrix. Zero points, where there are any, are
int8 [out, groups], or packed like codes along the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.checkpoint.quantized.gptq import bits_of
from gemma_deploy.checkpoint.quantized.matrix import CodedMatrix, MisfitError
from gemma_deploy.checkpoint.quantized.packing import unpacked, words_of

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.stored import Stored

PACKED, INTEGER = "weight_packed", "weight"
SCALE, ZERO_POINT, SHAPE, ORDER = "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"
NAME = "compressed-tensors"


class CompressedMatrix(CodedMatrix):
    """See the module.

    Args:
        parts: by the last part of their names.
    """

    def __init__(self, name: str, parts: Mapping[str, Stored[Any]]) -> None:
        main = PACKED if PACKED in parts else INTEGER
        if SCALE not in parts:
            raise MisfitError(f"{name}: {main} has no {SCALE}")
        stored, scale = parts[main].entry.shape, parts[SCALE].entry.shape
        shape, bits = (tuple(stored), 8) if main == INTEGER else _shape_of(name, parts)
        if len(shape) != 2 or len(scale) not in (1, 2) or (len(scale) == 1 and scale != (1,) and scale != shape[:1]):
            raise MisfitError(f"{name}: {SCALE} {list(scale)} does not fit codes {list(shape)}")
        if len(scale) == 2 and scale[0] not in (1, shape[0]):
            raise MisfitError(f"{name}: {SCALE} {list(scale)} does not fit codes {list(shape)}: a row each, or one")
        if len(scale) == 2 and scale[0] == 1 and scale[1] != 1:
            raise MisfitError(f"{name}: {SCALE} {list(scale)} does not fit codes {list(shape)}: a row each, or one")
        groups = scale[1] if len(scale) == 2 else 1
        ordered = [parts[main], *(part for key, part in parts.items() if key != main)]
        super().__init__(name, shape, tuple(ordered), bits=bits, groups=groups, packing=NAME, order=parts.get(ORDER))
        self._codes, self._scale, self._packed = parts[main], parts[SCALE], main == PACKED
        self._zeros = parts.get(ZERO_POINT)
        self._check_zeros()

    def differences(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`."""
        stored = self._codes.raw_rows(start, stop)
        if self._packed:
            codes = unpacked(stored, self.bits)[:, : self.shape[1]].astype(np.int16) - (1 << (self.bits - 1))
        else:
            codes = stored.astype(np.int16)
        if self._zeros is None:
            return codes
        return self.less(codes, self._signed_zeros(start, stop))

    def scales(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`."""
        if self._scale.entry.shape[0] == 1 and self.shape[0] != 1:
            return np.repeat(self._scale.whole().reshape(1, 1), stop - start, axis=0)
        return self._scale.rows(start, stop).reshape(stop - start, self.groups)

    def zero_points(self) -> tuple[int, int]:
        """See `CodedMatrix`."""
        return self._bounds

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        middle = 1 << (self.bits - 1)
        if self._zeros is None:
            return middle, middle
        zeros = self._signed_zeros(0, self.shape[0])
        return int(zeros.min()) + middle, int(zeros.max()) + middle

    def _signed_zeros(self, start: int, stop: int) -> np.ndarray:
        """Zero points of rows, less half the codes' range, int16 [rows, groups]."""
        assert self._zeros is not None
        if not self._zeros_packed:
            return self._zeros.raw_rows(start, stop).reshape(stop - start, self.groups).astype(np.int16)
        each = 32 // self.bits
        first, last = start // each, -(-stop // each)
        stored = unpacked(self._zeros.raw_rows(first, last).T, self.bits)[:, start - first * each : stop - first * each]
        return stored.T.astype(np.int16) - (1 << (self.bits - 1))

    @property
    def _zeros_packed(self) -> bool:
        return self._zeros is not None and self._zeros.entry.dtype == "int32"

    def _check_zeros(self) -> None:
        if self._zeros is None:
            return
        found = self._zeros.entry
        rows = words_of(self.shape[0], self.bits) if self._zeros_packed else self.shape[0]
        if found.dtype not in ("int32", "int8") or found.shape not in (
            (rows, self.groups),
            (rows,) * (self.groups == 1),
        ):
            raise MisfitError(
                f"{self.name}: {ZERO_POINT} is {found.dtype} {list(found.shape)}, expected [{rows}, {self.groups}]"
            )


def _shape_of(name: str, parts: Mapping[str, Stored[Any]]) -> tuple[tuple[int, ...], int]:
    """Shape and bits of packed codes, which `weight_shape` tells."""
    said, words = parts.get(SHAPE), parts[PACKED].entry
    if said is None or said.entry.shape != (2,) or not said.entry.dtype.startswith("int"):
        raise MisfitError(f"{name}: {PACKED} has no {SHAPE} of two whole numbers, [out, in]")
    rows, columns = (int(one) for one in said.raw_rows(0, 2))
    if words.dtype != "int32" or len(words.shape) != 2 or words.shape[0] != rows or columns < 1:
        raise MisfitError(
            f"{name}: {PACKED} is {words.dtype} {list(words.shape)}, but {SHAPE} says [{rows}, {columns}]"
        )
    for bits in (4, 8):
        if words_of(columns, bits) == words.shape[1]:
            return (rows, columns), bits
    return (rows, columns), bits_of(name, words.shape[1], columns)
