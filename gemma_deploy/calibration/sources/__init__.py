"""Data sets to calibrate on: each one file with a function from a path to texts, and one row in the table here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_deploy.calibration.sources import alpaca, c4, ceval


@dataclass(frozen=True)
class Source:
    """One data set.

    Args:
        texts: yields the texts of a file, in the file's order; raises CalibrationError for a damaged one.
        bundled: the sample's name in calib/.
    """

    texts: Callable[[Path], Iterator[str]]
    bundled: str


SOURCES = {
    "c4": Source(c4.texts, "c4_sample.json.gz"),
    "ceval": Source(ceval.texts, "ceval_sample.zip"),
    "alpaca": Source(alpaca.texts, "alpaca_sample.json"),
}
