"""The table of calibrated quantizers: a scheme's name, how its result is stored, and how the solver is set.

A new one is a solver in a file of its own and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantizer:
    """One calibrated scheme.

    Args:
        stored: the scheme whose parameters and graphs hold the result.
        bits: of a code.
        compensate: whether rounding moves errors onto later columns.
    """

    stored: str
    bits: int
    compensate: bool


QUANTIZERS: Mapping[str, Quantizer] = {"w8a16_gptq": Quantizer("w8a16_folded", 8, True)}


def stored_scheme(scheme: str) -> str:
    """The scheme whose graphs and parameter names an artifact of this scheme has."""
    return QUANTIZERS[scheme].stored if scheme in QUANTIZERS else scheme
