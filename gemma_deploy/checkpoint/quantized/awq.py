"""AWQ as AutoAWQ's `gemm` writes it: `qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales` [groups, out].

A word holds codes of eight neighbouring outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, from the lowest bits on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.checkpoint.quantized.gptq import NEEDED
from gemma_deploy.checkpoint.quantized.matrix import MisfitError, TransposedMatrix
from gemma_deploy.checkpoint.quantized.packing import WORD_BITS, unpacked

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.stored import Stored

BITS = 4
EACH = WORD_BITS // BITS
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # output of a word -> its place there: the inverse of the order above


class AwqMatrix(TransposedMatrix):
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
        return self.less(_outputs(self._codes, start, stop), self._zeros_of(start, stop))

    def _zeros_of(self, start: int, stop: int) -> np.ndarray:
        """See `TransposedMatrix`."""
        return _outputs(self._zeros, start, stop)


def _outputs(part: Stored[Any], start: int, stop: int) -> np.ndarray:
    """Codes of outputs [start, stop) of a tensor [n, out / 8], int16 [stop - start, n]."""
    first, last = start // EACH, -(-stop // EACH)
    words = part.file.raw_columns(part.name, first, last)
    codes = unpacked(words, BITS).reshape(len(words), last - first, EACH)[..., PLACES]
    codes = codes.reshape(len(words), EACH * (last - first))
    return np.ascontiguousarray(codes[:, start - first * EACH : stop - first * EACH].T, np.int16)
