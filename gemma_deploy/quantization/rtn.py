"""Round to nearest: symmetric int8 with one float32 scale per row (output channel, or table row).

scale = absmax / 127 (1.0 for zero rows), q = clip(round_half_even(w / scale), -127, 127). Knows nothing of files.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

QMAX = 127


def row_scales(absmax: torch.Tensor, qmax: int = QMAX) -> torch.Tensor:
    """Scales [rows] of rows whose largest magnitudes are absmax: [rows] float32.

    A zero row gets 1.0, and so does one of subnormals so small that absmax / qmax underflows to zero.
    """
    scale = absmax / qmax
    return scale.masked_fill_(scale == 0, 1.0)


def quantize_rows(
    w: torch.Tensor | np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Quantize w: [rows, in] float32, which is left as it is.

    Returns:
        q: [rows, in] int8; scale: [rows] float32; power sum of the signal; power sum of the error w - q * scale.
    """
    import torch

    w = torch.tensor(w, dtype=torch.float32) if not isinstance(w, torch.Tensor) else w.to(torch.float32, copy=True)
    scale = row_scales(w.abs().amax(1))
    q = torch.empty(w.shape, dtype=torch.int8)
    signal, error = quantize_rows_(w, scale, q, scratch=torch.empty_like(w))
    return q, scale, math.fsum(signal.tolist()), math.fsum(error.tolist())


def quantize_rows_(
    w: torch.Tensor, scale: torch.Tensor, q: torch.Tensor, *, scratch: torch.Tensor, qmax: int = QMAX
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without allocating: w [rows, in] float32 is destroyed, q [rows, in] int8 is filled.

    Powers are measured in units of the scale, where nothing over- or underflows, and per row, so that their sum does
    not depend on how a matrix was cut into blocks.

    Returns:
        Power of the signal and of the error, each [rows] float64.
    """
    import torch

    torch.div(w, scale[:, None], out=scratch)
    torch.round(scratch, out=w)  # half to even
    w.clamp_(-qmax, qmax)
    q.copy_(w)
    w.sub_(scratch)
    unit = scale.double().square_()
    return _row_power(scratch).mul_(unit), _row_power(w).mul_(unit)


def sqnr_db(signal: float, error: float) -> float | None:
    """Signal to quantization noise in dB; None where there is no noise, so that it stays a JSON number."""
    if signal <= 0 or error <= 0:
        return None
    return 10 * math.log10(signal / error)


def _row_power(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each row, [rows] float64; vector_norm runs at memory speed, vecdot at a quarter of it."""
    import torch

    norm: torch.Tensor = torch.linalg.vector_norm(x, 2, dim=1)
    return norm.double().square_()
