"""AWQ as AutoAWQ's `gemm` writes it: `qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales` [groups, out].

A word holds codes of eight neighbouring outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, from the lowest bits on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.checkpoint.quantized.gptq import NEEDED
from gemma_deploy.checkpoint.quantized.matrix import CodedMatrix, MisfitError
from gemma_deploy.checkpoint.quantized.packing import WORD_BITS, unpacked

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.stored import Stored

BITS = 4
EACH = WORD_BITS // BITS
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # output of a word -> its place there: the inverse of the order above


class AwqMatrix(CodedMatrix):
    """See the module.

    Args:
        parts: by the last part of their names.
    """

    def __init__(self, name: str, parts: Mapping[str, Stored[Any]]) -> None:
        words, zeros, scales = (parts[one].entry.shape for one in NEEDED)
        fits = len(words) == len(zeros) == len(scales) == 2 and words[1] == zeros[1] and zeros[0] == scales[0]
        if not fits or words[1] * EACH != scales[1]:
            raise MisfitError(
                f"{name}: qweight {list(words)}, qzeros {list(zeros)} and scales {list(scales)} do not fit each other "
                "(AWQ of 4 bits: [in, out / 8], [groups, out / 8], [groups, out])"
            )
        super().__init__(name, (scales[1], words[0]), tuple(parts.values()), bits=BITS, groups=scales[0], packing="AWQ")
        self._codes, self._zeros, self._scales = (parts[one] for one in NEEDED)

    def differences(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`."""
        codes = _outputs(self._codes, start, stop).astype(np.int16)
        return self.less(codes, _outputs(self._zeros, start, stop).astype(np.int16))

    def scales(self, start: int, stop: int) -> np.ndarray:
        """See `CodedMatrix`."""
        return self._scales.file.float_columns(self._scales.name, start, stop).T.copy()

    def zero_points(self) -> tuple[int, int]:
        """See `CodedMatrix`."""
        return self._bounds

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        zeros = _outputs(self._zeros, 0, self.shape[0])
        return int(zeros.min()), int(zeros.max())


def _outputs(part: Stored[Any], start: int, stop: int) -> np.ndarray:
    """Codes of outputs [start, stop) of a tensor [n, out / 8], uint8 [stop - start, n]."""
    first, last = start // EACH, -(-stop // EACH)
    words = part.file.raw_columns(part.name, first, last)
    codes = unpacked(words, BITS).reshape(len(words), last - first, EACH)[..., PLACES]
    codes = codes.reshape(len(words), EACH * (last - first))
    return np.ascontiguousarray(codes[:, start - first * EACH : stop - first * EACH].T)
