"""The data sets of a mix, found: the file, sample or hub data set behind each name, and what identifies its bytes.

First step of calibration: words (calibration/mix.py) in, rows out. Renders and tokenizes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from gemma_deploy.calibration.mix import HubPlace, MixEntry
from gemma_deploy.calibration.sources import SOURCES, DataSource, hub
from gemma_deploy.calibration.sources.reading import Row, explained
from gemma_deploy.calibration.store import sha256_of
from gemma_deploy.errors import CalibrationError

T = TypeVar("T")
P = TypeVar("P")


@dataclass(frozen=True)
class Located:
    """One data set of a mix.

    Args:
        windows: how many are cut from it.
        mixed: whether there are others in the mix.
        place: its file, or its commit on the hub.
        bundled: the file is the sample in calib/.
    """

    name: str
    windows: int
    mixed: bool
    place: Path | hub.Pinned
    bundled: bool

    @property
    def source(self) -> DataSource:
        """How its rows are read and rendered."""
        return SOURCES[self.name]

    @property
    def where(self) -> str:
        """The place, for messages."""
        return f"{self.place} (the bundled sample)" if self.bundled else str(self.place)

    def rows(self) -> Iterator[Row]:
        """All rows, in the order of the data set."""
        if isinstance(self.place, Path):
            return self.source.rows(self.place)
        found = hub.rows(self.place, self.source.fields)
        return (row for row in found if self.source.text(row).strip())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Name, windows, and the file's name and sha256 or the commit on the hub, as JSON.

        Raises:
            CalibrationError: the file cannot be read.
        """
        said: dict[str, Any] = {"name": self.name, "windows": self.windows}
        if not isinstance(self.place, Path):
            return said | self.place.describe()
        with explained(self.place, f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name} file"):
            return said | {"file": self.place.name, "sha256": sha256_of(self.place), "bundled": self.bundled}


def locate(parts: Iterable[MixEntry], nsamples: int) -> tuple[Located, ...]:
    """Find every data set, and read the bytes that identify it.

    Args:
        parts: of a mix without problems.
        nsamples: windows where the mix says none.

    Raises:
        CalibrationError: naming every one that is not there, or cannot be reached.
    """
    parts = tuple(parts)

    def find(part: MixEntry) -> Located:
        place: Path | hub.Pinned
        if isinstance(part.place, HubPlace):
            place = hub.pin(part.place, SOURCES[part.name].hub)
        else:
            place = part.place or SOURCES[part.name].sample
        found = Located(part.name, part.windows or nsamples, len(parts) > 1, place, part.place is None)
        _ = found.identity
        return found

    return tuple(each(find, parts))


def each(work: Callable[[P], T], items: Iterable[P]) -> list[T]:
    """The results of `work` on every item; when it fails, it fails once, with the errors of all of them."""
    done: list[T] = []
    errors: list[CalibrationError] = []
    for item in items:
        try:
            done.append(work(item))
        except CalibrationError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise CalibrationError(
            f"{len(errors)} data sets of the mix cannot be used",
            problems=[f"{error.where}: {error.what}" for error in errors],
            expected="; ".join(dict.fromkeys(error.expected for error in errors if error.expected)),
            next_step="; ".join(dict.fromkeys(error.next_step for error in errors if error.next_step)),
        )
    return done
