"""bitsandbytes: 4-bit codes that name one of 16 values (nf4, fp4), and int8 rows.

`weight` [elements / 2, 1] holds two codes a byte, the first in the *high* half. Blocks of `blocksize` elements, which
run across rows, share a largest magnitude `weight.absmax`; where that is quantized itself, it is one of the 256 values
`weight.nested_quant_map` times `weight.nested_absmax` of its block, plus an offset. `weight.quant_state.*` is JSON.
int8 (`SCB`): w = code * SCB / 127 of the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.checkpoint.quantized.matrix import CodedMatrix, MisfitError, QuantizedWeight
from gemma_deploy.schemes import Codes

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.stored import Stored

STATE = "weight.quant_state.bitsandbytes__"
CODES, ABSMAX, VALUES = "weight", "weight.absmax", "weight.quant_map"
NESTED, NESTED_VALUES = "weight.nested_absmax", "weight.nested_quant_map"
ROW_MAXIMA = "SCB"
STATE_LIMIT_BYTES = 1 << 16


class ValueMatrix(QuantizedWeight):
    """Codes of 4 bits that name a value.

    Args:
        parts: by what follows the module's path in their names.
    """

    def __init__(self, name: str, parts: Mapping[str, Stored[Any]]) -> None:
        self._state = _state_of(name, parts)
        shape = tuple(self._state["shape"])
        super().__init__(name, shape, (parts[CODES], *(part for key, part in parts.items() if key != CODES)))
        self._absmax, self._values = parts.get(ABSMAX), parts.get(VALUES)
        self._nested, self._nested_values = parts.get(NESTED), parts.get(NESTED_VALUES)
        self.kind, self._block = str(self._state["quant_type"]), int(self._state["blocksize"])
        count = shape[0] * shape[1]
        stored = parts[CODES].entry
        blocks = -(-count // self._block)
        problems = []
        if stored.dtype != "uint8" or stored.shape != (-(-count // 2), 1):
            problems.append(f"weight is {stored.dtype} {list(stored.shape)}, expected uint8 [{-(-count // 2)}, 1]")
        if self._absmax is None or self._absmax.entry.shape != (blocks,):
            problems.append(f"{ABSMAX} does not hold {blocks} numbers, one for each {self._block} elements")
        if self._values is None or self._values.entry.shape != (16,):
            problems.append(f"{VALUES} does not hold 16 values")
        if self.is_nested and (self._nested is None or self._nested_values is None):
            problems.append(f"{ABSMAX} is uint8, and there is no {NESTED} or {NESTED_VALUES} for it")
        if problems:
            raise MisfitError(f"{name}: {'; '.join(problems)}")

    @property
    def is_nested(self) -> bool:
        """Whether the magnitudes are quantized too (double quantization)."""
        return self._absmax is not None and self._absmax.entry.dtype == "uint8"

    @property
    def described(self) -> str:
        """See `QuantizedWeight`."""
        nested = ", double quantization" if self.is_nested else ""
        return f"{self.kind} in blocks of {self._block}, bitsandbytes{nested}"

    def why_not(self, form: Codes) -> str | None:
        """See `QuantizedWeight`."""
        return f"the 16 values of {self.kind} are no multiples of a scale"

    def rows(self, start: int, stop: int) -> np.ndarray:
        """See `QuantizedWeight`."""
        width = self.shape[1]
        first, last = start * width, stop * width
        at = first - first % 2
        octets = self.parts[0].raw_rows(at // 2, -(-last // 2)).reshape(-1)
        codes = np.empty(2 * len(octets), np.uint8)
        codes[0::2], codes[1::2] = octets >> 4, octets & 15
        found: np.ndarray = self._sixteen[codes[first - at : last - at]]
        low, high = first // self._block, -(-last // self._block)
        magnitudes = np.repeat(self._magnitudes(low, high), self._block)
        found *= magnitudes[first - low * self._block : last - low * self._block]
        return found.reshape(stop - start, width)

    def _magnitudes(self, low: int, high: int) -> np.ndarray:
        """Of blocks [low, high), float32."""
        assert self._absmax is not None
        if not self.is_nested:
            return self._absmax.rows(low, high)
        assert self._nested is not None
        assert self._nested_values is not None
        codes, size = self._absmax.raw_rows(low, high), int(self._state["nested_blocksize"])
        outer = self._nested.rows(low // size, -(-high // size))
        scales = np.repeat(outer, size)[low - low // size * size :][: high - low]
        offset = np.float32(self._state["nested_offset"])
        values: np.ndarray = self._nested_values.whole()[codes] * scales + offset
        return values

    @cached_property
    def _sixteen(self) -> np.ndarray:
        assert self._values is not None
        return self._values.whole()


class RowMatrix(CodedMatrix):
    """int8 with a largest magnitude for each row.

    Args:
        parts: as above.
    """

    def __init__(self, name: str, parts: Mapping[str, Stored[Any]]) -> None:
        codes, maxima = parts[CODES].entry, parts[ROW_MAXIMA].entry
        if len(codes.shape) != 2 or maxima.shape != codes.shape[:1]:
            raise MisfitError(f"{name}: {ROW_MAXIMA} {list(maxima.shape)} does not fit codes {list(codes.shape)}")
        ordered = (parts[CODES], *(part for key, part in parts.items() if key != CODES))
        super().__init__(name, codes.shape, ordered, bits=8, groups=1, packing="bitsandbytes")
        self._codes, self._maxima = parts[CODES], parts[ROW_MAXIMA]

    def differences(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`."""
        return self._codes.raw_rows(start, stop).astype(np.int16)

    def scales(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`: SCB / 127, rounded to float32."""
        found: np.ndarray = (self._maxima.rows(start, stop).astype(np.float64) / 127).astype(np.float32)
        return found[:, None]


def _state_of(name: str, parts: Mapping[str, Stored[Any]]) -> dict[str, Any]:
    """What `quant_state` says, its numbers checked."""
    keys = [key for key in parts if key.startswith(STATE)]
    if len(keys) != 1:
        raise MisfitError(f"{name}: {len(keys)} tensors {STATE}* instead of one")
    entry = parts[keys[0]].entry
    if entry.dtype != "uint8" or len(entry.shape) != 1 or entry.shape[0] > STATE_LIMIT_BYTES:
        raise MisfitError(f"{name}: {keys[0]} is no text")
    try:
        state = json.loads(bytes(parts[keys[0]].raw_rows(0, entry.shape[0])))
    except ValueError as error:
        raise MisfitError(f"{name}: {keys[0]} is no JSON") from error
    numbers = ["blocksize", *(["nested_blocksize"] if NESTED in parts else [])]
    shape = state.get("shape") if isinstance(state, dict) else None
    right = isinstance(shape, list) and len(shape) == 2 and all(_is_size(one) for one in shape)
    if not right or state.get("quant_type") not in ("nf4", "fp4") or not all(_is_size(state.get(n)) for n in numbers):
        raise MisfitError(f"{name}: {keys[0]} does not say quant_type nf4 or fp4, a shape [out, in] and block sizes")
    if NESTED in parts and type(state.get("nested_offset")) not in (int, float):
        raise MisfitError(f"{name}: {keys[0]} has no nested_offset")
    return dict(state)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31
