"""What a manifest holds of the text that was looked at."""

from __future__ import annotations

from typing import NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from gemma_deploy.bounds import Count

OPEN = ConfigDict(extra="allow", strict=True)  # as `Open` of manifest.py, of a record that stays a dict


class CalibrationSource(TypedDict):
    """One data set, and where its text came from: a bundled sample, a file, or the hub."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    name: str
    windows: Count
    bundled: NotRequired[bool]
    file: NotRequired[str]
    hub: NotRequired[str]
    revision: NotRequired[str]


class CalibrationWindows(TypedDict):
    """How much text was looked at."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    nsamples: Count
    seqlen: Count


class CalibrationRecord(TypedDict):
    """`calibration.pipeline.dataset_record`: the keys that are read here are typed, and others are kept."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    sources: list[CalibrationSource]
    windows: CalibrationWindows
