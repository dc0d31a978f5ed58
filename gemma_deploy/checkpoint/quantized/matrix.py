"""A weight that arrives quantized, beside the float tensor: `Rows` of float32, and where it has codes, the codes.

A matrix of codes is w = (code - zero point) * scale, with a scale for each row, or each row and run of columns. The
product of a code and a scale is exact in float32 for scales of 16 bits, so that dequantizing rounds nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.schemes import Codes

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.stored import Stored


SCALE_ROWS = 4096  # looked at together


class MisfitError(Exception):
    """Tensors that do not make a matrix together; the message names them."""


@dataclass(frozen=True)
class Dequantized:
    """Shape and dtype of what is read."""

    shape: tuple[int, ...]
    dtype: str = "float32"


class QuantizedWeight(ABC):
    """A matrix [out, in] that a file holds in another form than as floats; a `Rows`.

    Args:
        name: what the matrix would be called in the file, were it one of floats.
        shape: [out, in].
        parts: the tensors it is made of, the codes first.
    """

    def __init__(self, name: str, shape: tuple[int, int], parts: tuple[Stored[Any], ...]) -> None:
        self.name, self.shape, self.parts = name, shape, parts

    @property
    def entry(self) -> Dequantized:
        """Of `rows`."""
        return Dequantized(self.shape)

    @property
    def file(self) -> Any:
        """The open file of the codes."""
        return self.parts[0].file

    @property
    def nbytes(self) -> int:
        """Of all parts, in their files."""
        return sum(part.nbytes for part in self.parts)

    @property
    @abstractmethod
    def described(self) -> str:
        """The form it has, for people: `int4 in groups of 128, GPTQ`."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) dequantized, float32."""

    def raw_rows(self, start: int, stop: int) -> np.ndarray:
        """As `rows`."""
        return self.rows(start, stop)

    @abstractmethod
    def why_not(self, form: Codes) -> str | None:
        """Why an artifact whose codes have this form cannot take the weight over; None where it can."""


class CodedMatrix(QuantizedWeight):
    """A matrix of integer codes and scales.

    Args:
        bits: of a code.
        groups: scales of a row, each of a run of columns as long as the others.
        packing: who packs codes so.
        order: int32 [in] the group of each column, where act order dealt columns to groups; -1 everywhere: it did not.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        parts: tuple[Stored[Any], ...],
        *,
        bits: int,
        groups: int,
        packing: str,
        order: Stored[Any] | None = None,
    ) -> None:
        super().__init__(name, shape, parts)
        self.bits, self.groups, self.packing, self._order = bits, groups, packing, order
        if groups < 1 or shape[1] % groups:
            raise MisfitError(f"{name}: {groups} scales a row do not divide its {shape[1]} columns")
        if order is not None and order.entry.shape != (shape[1],):
            raise MisfitError(f"{order.name} is {list(order.entry.shape)}, its codes have {shape[1]} columns")

    @property
    def groupsize(self) -> int | None:
        """Columns that share a scale; None where a row has one."""
        return None if self.groups == 1 else self._run

    @property
    def _run(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.groups

    @property
    def described(self) -> str:
        """See `QuantizedWeight`."""
        size = self.groupsize
        return f"int{self.bits} {f'in groups of {size}' if size else 'per row'}, {self.packing}"

    @abstractmethod
    def differences(self, start: int, stop: int) -> np.ndarray:
        """Codes of rows [start, stop) less their zero points, int16 [stop - start, in]."""

    @abstractmethod
    def scales(self, start: int, stop: int) -> np.ndarray:
        """Of the same rows, float32 [stop - start, groups]."""

    def zero_points(self) -> tuple[int, int]:
        """The least and the largest; the middle of the codes' range where they are symmetric."""
        middle = 1 << (self.bits - 1)
        return middle, middle

    def order(self) -> np.ndarray | None:
        """[in] the group of each column, where groups are no runs of columns.

        Raises:
            MisfitError: it names groups that there are not.
        """
        return None if self._order is None or self._in_runs else self._order.raw_rows(0, self.shape[1])

    @cached_property
    def _in_runs(self) -> bool:
        assert self._order is not None
        order = self._order.raw_rows(0, self.shape[1])
        if (order == -1).all():
            return True
        if order.min() < 0 or order.max() >= self.groups:
            raise MisfitError(f"{self._order.name} names groups {order.min()} to {order.max()} of {self.groups}")
        return bool(np.array_equal(order, np.arange(self.shape[1]) // self._run))

    def less(self, codes: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """Codes int16 [rows, in], which may be changed, less the zero points [rows, groups] of their columns."""
        order = self.order()
        if order is not None:
            codes -= zeros[:, order]
        else:
            codes.reshape(len(codes), self.groups, self._run)[...] -= zeros[..., None]
        return codes

    def rows(self, start: int, stop: int) -> np.ndarray:
        """See `QuantizedWeight`."""
        codes, scales, order = self.differences(start, stop).astype(np.float32), self.scales(start, stop), self.order()
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number is found where it is stored
            if order is not None:
                codes *= scales[:, order]
            else:
                codes.reshape(len(codes), self.groups, self._run)[...] *= scales[..., None]
        return codes

    def why_not(self, form: Codes) -> str | None:
        """See `QuantizedWeight`: codes and scales must be representable as they are."""
        if self.order() is not None:
            return "its groups are no runs of columns (act order)"
        if form.groupsize is None and self.groups > 1:
            return f"it has a scale for each group of {self.groupsize} columns, the artifact one for each row"
        if form.groupsize and self._run % form.groupsize:
            return f"its groups of {self.groupsize} are no multiple of the artifact's {form.groupsize}"
        least, largest = self.zero_points()
        low, high = -largest, (1 << self.bits) - 1 - least
        if low < -(1 << (form.bits - 1)) or high >= 1 << (form.bits - 1):
            if least == largest == 1 << (self.bits - 1):
                return f"it has codes of {self.bits} bits, the artifact {form.bits}"
            return f"its zero points reach from {least} to {largest}, and {form.bits} bits do not hold the differences"
        if form.scales != "float32" and not self._scales_are(form.scales):
            return f"its scales are no numbers of {form.scales}"
        return None

    def _scales_are(self, dtype: str) -> bool:
        """Whether every scale is a number of a type of 16 bits."""
        for start in range(0, self.shape[0], SCALE_ROWS):
            scales = self.scales(start, min(start + SCALE_ROWS, self.shape[0]))
            if dtype == "bfloat16" and np.any(scales.view(np.uint32) & 0xFFFF):
                return False
            with np.errstate(over="ignore"):
                if dtype == "float16" and np.any(scales.astype(np.float16) != scales):
                    return False
        return True

    def taken_codes(self, start: int, stop: int) -> np.ndarray:
        """What an artifact stores of the codes that `why_not` has nothing against, int8 [stop - start, in]."""
        return self.differences(start, stop).astype(np.int8)

    def taken_scales(self, form: Codes, start: int, stop: int) -> np.ndarray:
        """The scales for them in this form, float32 [stop - start] or [stop - start, groups]: repeated at most."""
        scales = self.scales(start, stop)
        if form.groupsize is None:
            return scales[:, 0].copy()
        return np.repeat(scales, self._run // form.groupsize, axis=1)


class TransposedMatrix(CodedMatrix):
    """Codes, zero points and scales with the outputs in columns, as GPTQ and AWQ files have them; zero points vary.

    `_scales` is the tensor [groups, out].
    """

    _scales: Stored[Any]

    @abstractmethod
    def _zeros_of(self, start: int, stop: int) -> np.ndarray:
        """Zero points of rows [start, stop), int16 [stop - start, groups]."""

    def scales(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`."""
        return self._scales.file.float_columns(self._scales.name, start, stop).T.copy()

    def zero_points(self) -> tuple[int, int]:
        """See `CodedMatrix`."""
        return self._bounds

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        zeros = self._zeros_of(0, self.shape[0])
        return int(zeros.min()), int(zeros.max())
