"""GPTQ as AutoGPTQ and GPTQModel write it: `qweight` [in * bits / 32, out], `qzeros`, `scales` and `g_idx`.

A word of `qweight` holds codes of neighbouring input channels, one of `qzeros` [groups, out * bits / 32] those of
neighbouring outputs. The first version of the format stores each zero point less one (AutoGPTQ's `zeros -= 1` in
`pack`); here one is added modulo the codes' range, as its `qlinear_cuda_old` does: `qlinear_cuda` makes 16 of the 15
that a zero point of 0 became. `gptq_v2` stores it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.checkpoint.quantized.matrix import MisfitError, TransposedMatrix
from gemma_deploy.checkpoint.quantized.packing import BUILT_BITS, WORD_BITS, unpacked

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.stored import Stored

NEEDED = ("qweight", "qzeros", "scales")
STORED_LESS_ONE = {"gptq": 1, "gptq_v2": 0}


class GptqMatrix(TransposedMatrix):
    """See the module.

    Args:
        parts: by the last part of their names.
        version: `gptq` or `gptq_v2`.
    """

    def __init__(self, name: str, parts: Mapping[str, Stored[Any]], *, version: str) -> None:
        words, zeros, scales = (parts[one].entry.shape for one in NEEDED)
        if not len(words) == len(zeros) == len(scales) == 2 or words[1] != scales[1] or zeros[0] != scales[0]:
            raise MisfitError(
                f"{name}: qweight {list(words)}, qzeros {list(zeros)} and scales {list(scales)} do not fit each other "
                "(GPTQ: [in * bits / 32, out], [groups, out * bits / 32], [groups, out])"
            )
        bits = bits_of(name, zeros[1], scales[1])
        columns = words[0] * WORD_BITS // bits
        shape, order = (scales[1], columns), parts.get("g_idx")
        super().__init__(name, shape, tuple(parts.values()), bits=bits, groups=scales[0], packing="GPTQ", order=order)
        self._codes, self._zeros, self._scales = (parts[one] for one in NEEDED)
        self._less = STORED_LESS_ONE[version]

    def differences(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`."""
        words = self._codes.file.raw_columns(self._codes.name, start, stop)
        codes = unpacked(words.T, self.bits).astype(np.int16)
        return self.less(codes, self._zeros_of(start, stop))

    def _zeros_of(self, start: int, stop: int) -> np.ndarray:
        """See `TransposedMatrix`."""
        each = WORD_BITS // self.bits
        first, last = start // each, -(-stop // each)
        words = self._zeros.file.raw_columns(self._zeros.name, first, last)
        stored = unpacked(words, self.bits)[:, start - first * each : stop - first * each].T.astype(np.int16)
        return (stored + self._less) & ((1 << self.bits) - 1)


def bits_of(name: str, words: int, codes: int) -> int:
    """Bits of a code, where so many words hold so many codes.

    Raises:
        MisfitError: it is a number of bits that is not built.
    """
    bits = words * WORD_BITS / codes if codes else 0
    if bits not in BUILT_BITS:
        raise MisfitError(f"{name}: {words} words hold {codes} codes, which are then of {bits:g} bits, not of 4 or 8")
    return int(bits)
