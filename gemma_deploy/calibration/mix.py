"""The words for calibration data: `c4`, `c4:64,alpaca:64`, and where each of them lies. Reads nothing.

    dataset   NAME                            all of nsamples windows from one data set
              NAME:WINDOWS,NAME:WINDOWS,...   that many windows of seqlen tokens from each; nsamples is their sum
    path      (nothing)                       the bundled samples
              PLACE                           of the only data set
              NAME=PLACE,NAME=PLACE,...       of those named; the bundled samples of the others
    PLACE     FILE
              hub[:OWNER/NAME[:CONFIG]][@REVISION]    streamed from the Hugging Face hub; a file called hub is ./hub

The same words serve `calibrate --dataset --path` and a recipe's `dataset.name`, `dataset.path`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from gemma_deploy.reading import expand

DATASETS = ("c4", "ceval", "alpaca")
EXAMPLE = "c4:64,ceval:32,alpaca:32"
NAME, PATH, NSAMPLES = "name", "path", "nsamples"  # what a problem is about: the keys of a recipe's dataset section
_NEXT_NAME = re.compile(r",(?=\s*\w+=)")  # a comma inside a file name stays
_KEYED = re.compile(r"\s*(\w+)=(.*)", re.DOTALL)
_HUB = re.compile(r"hub(?::(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?)?(?:@(?P<revision>[\w./-]+))?")

Problem = tuple[str, str]  # (NAME, PATH or NSAMPLES; sentence)


@dataclass(frozen=True)
class HubPlace:
    """A data set on the hub; what is None is the one that the source names (calibration/sources/hub.py)."""

    repo: str | None = None
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class MixEntry:
    """One data set of a mix.

    Args:
        windows: how many; None where the mix leaves it to nsamples.
        place: a file, the hub, or None for the bundled sample.
    """

    name: str
    windows: int | None = None
    place: Path | HubPlace | None = None


@dataclass(frozen=True)
class Mix:
    """What was asked for, and everything that is wrong with it."""

    parts: tuple[MixEntry, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def windows(self) -> int | None:
        """All windows; None where the mix leaves it to nsamples."""
        counts = [part.windows for part in self.parts]
        return None if None in counts or not counts else sum(count for count in counts if count is not None)


def read_mix(dataset: str, path: str | None = None, nsamples: int | None = None) -> Mix:
    """Understand the words.

    Args:
        dataset, path: see the top of this module.
        nsamples: where it was given, it must agree with the windows in `dataset`.

    Returns:
        A mix; it makes sense only when it has no problems.
    """
    parts, problems = _read_dataset(dataset)
    places, wrong = _read_path(path, [part.name for part in parts])
    parts = [MixEntry(part.name, part.windows, places.get(part.name)) for part in parts]
    problems += wrong
    total = Mix(tuple(parts)).windows
    if not problems and nsamples is not None and total is not None and nsamples != total:
        problems.append((NSAMPLES, f"{nsamples}, but the windows of {dataset} add up to {total}: leave it out"))
    return Mix(tuple(parts), tuple(problems))


def turn_order(counts: Sequence[int]) -> list[int]:
    """The part (by index) that gives each window, every part spread evenly over the whole.

    Window i of a part of n stands at (i + 1/2) / n of the way, ties in the order written. So any first k windows hold
    k n / N of that part, give or take one, where N is all of them.
    """
    places = [(Fraction(2 * i + 1, 2 * count), part) for part, count in enumerate(counts) for i in range(count)]
    return [part for _, part in sorted(places)]


def shortened(dataset: str, windows: int) -> str:
    """The words for about so many windows of the same mix, at least one of each part; `c4` stays `c4`."""
    mix = read_mix(dataset)
    if mix.problems or mix.windows is None:
        return dataset
    counts = [part.windows or 0 for part in mix.parts]
    first = turn_order(counts)[:windows]
    return ",".join(f"{part.name}:{max(1, first.count(index))}" for index, part in enumerate(mix.parts))


def _read_dataset(dataset: str) -> tuple[list[MixEntry], list[Problem]]:
    items = [item.strip() for item in dataset.split(",")]
    parts: list[MixEntry] = []
    problems: list[Problem] = []
    for item in items:
        name, colon, count = (piece.strip() for piece in item.partition(":"))
        if name not in DATASETS:
            problems.append((NAME, _unknown(name)))
        elif name in [part.name for part in parts]:
            problems.append((NAME, f"{name} is named twice: write it once, with all its windows"))
        elif colon and not re.fullmatch(r"0{0,9}[1-9][0-9]{0,8}", count):
            told = item if len(item) <= 40 else f"{item[:40]}..."
            problems.append((NAME, f"got '{told}', expected {name}:WINDOWS with a whole number of 1 to 999999999"))
        elif not colon and len(items) > 1:
            problems.append((NAME, f"{name} has no number of windows; in a mix each has one, such as {EXAMPLE}"))
        else:
            parts.append(MixEntry(name, int(count) if colon else None))
    return parts, problems


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    hint = f"; did you mean `{close[0]}`?" if close else f" (or a mix such as {EXAMPLE})"
    return f"'{name}' is not one of {', '.join(map(repr, DATASETS))}{hint}"


def _read_path(path: str | None, names: Sequence[str]) -> tuple[dict[str, Path | HubPlace], list[Problem]]:
    """Where each named data set lies."""
    if path is None:
        return {}, []
    problems: list[Problem] = []
    places: dict[str, Path | HubPlace] = {}
    for name, place in _split_path(path, names):
        if name is None:
            problems.append((PATH, f"'{path}' says not whose it is: write {_keyed_example(names)}"))
        elif name not in names:
            known = " or ".join(names) or "a data set"
            problems.append((PATH, f"{name}= is not in the mix; expected {known} before the ="))
        elif name in places:
            problems.append((PATH, f"{name}= is given twice: keep one"))
        elif not place:
            problems.append((PATH, f"nothing stands after {name}=: write a file, or leave it out for the sample"))
        elif (found := _read_place(place)) is None:
            form = "hub, hub:OWNER/NAME or hub:OWNER/NAME:CONFIG, with @REVISION or without"
            problems.append((PATH, f"got '{place}', expected {form}"))
        else:
            places[name] = found
    return places, problems


def _split_path(path: str, names: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    """(data set, place) of each piece; a plain path belongs to the only data set there is."""
    first = _KEYED.fullmatch(path)
    if first is None or (len(names) == 1 and first[1] not in DATASETS):
        yield (names[0] if len(names) == 1 else None), path
        return
    for piece in _NEXT_NAME.split(path):
        match = _KEYED.fullmatch(piece)
        assert match is not None  # the first piece matched, and a comma splits only before NAME=
        yield match[1], match[2].strip()


def _read_place(place: str) -> Path | HubPlace | None:
    if place != "hub" and not place.startswith(("hub:", "hub@")):
        return expand(place)
    match = _HUB.fullmatch(place)
    return None if match is None else HubPlace(match["repo"], match["config"], match["revision"])


def _keyed_example(names: Sequence[str]) -> str:
    return ",".join(f"{name}=FILE" for name in names) or "NAME=FILE"
