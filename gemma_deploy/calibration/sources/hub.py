"""Data sets of the Hugging Face hub, streamed: rows come as they are needed and nothing is kept on disk.

A name is first pinned to a commit, so that a fingerprint means one state of the data, and so that a machine without a
network is told so in one request instead of by retries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from gemma_deploy.calibration.mix import HubPlace
from gemma_deploy.calibration.sources.reading import Row, string_fields
from gemma_deploy.errors import CalibrationError, DeployError

COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_SECONDS = 20
INSTEAD = "give a file with --path (in a recipe: dataset.path), or leave it out to use the bundled sample"


@dataclass(frozen=True)
class HubSet:
    """Where a data set lies on the hub.

    Args:
        config: its part; None takes the only one, or with `every_config` all, in order of name.
        splits: read one after the other.
    """

    repo: str
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    every_config: bool = False


@dataclass(frozen=True)
class Pinned:
    """A data set of the hub at one commit."""

    place: HubSet
    revision: str

    def __str__(self) -> str:
        config = f":{self.place.config}" if self.place.config else ""
        return f"hub:{self.place.repo}{config}@{self.revision[:12]}"

    def describe(self) -> dict[str, Any]:
        """What identifies the data, as JSON."""
        return {
            "hub": self.place.repo,
            "config": self.place.config,
            "splits": list(self.place.splits),
            "revision": self.revision,
        }


def pin(asked: HubPlace, usual: HubSet) -> Pinned:
    """Fill in what was not said, and find the commit (a full commit hash needs no network).

    Args:
        asked: what the user wrote.
        usual: the source's own place; its config is that of its own repository only.

    Raises:
        CalibrationError: no network, no library, or no such data set.
    """
    repo = asked.repo or usual.repo
    config = asked.config or (usual.config if repo == usual.repo else None)
    place = HubSet(repo, config, usual.splits, usual.every_config)
    if asked.revision and COMMIT.fullmatch(asked.revision):
        return Pinned(place, asked.revision)
    with explained(f"hub:{repo}"):
        return Pinned(place, commit(repo, asked.revision))


@cache
def commit(repo: str, revision: str | None) -> str:
    """The commit of a branch or tag; asked once in the life of a process, so that all its stages see one state."""
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(repo, revision=revision, timeout=TIMEOUT_SECONDS).sha
    if not found:
        raise ValueError("the hub names no commit")
    return str(found)


def rows(pinned: Pinned, fields: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows: split after split, in each the configs in order of name.

    Raises:
        CalibrationError: the stream breaks, or a row has not these text fields.
    """
    place = pinned.place
    with explained(str(pinned)):
        import datasets

        configs: list[str | None] = [place.config]
        if place.config is None and place.every_config:
            configs = sorted(datasets.get_dataset_config_names(place.repo, revision=pinned.revision))
        number = 0
        for split in place.splits:
            for config in configs:
                stream = datasets.load_dataset(
                    place.repo, config, split=split, streaming=True, revision=pinned.revision
                )
                for row in stream:
                    problem = string_fields(row, fields)
                    if problem:
                        raise _unlike(problem, f"{pinned}, {config or 'default'}/{split}, row {number}", fields)
                    number += 1
                    yield row


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn whatever the libraries and the network say into one message."""
    try:
        yield
    except DeployError:
        raise
    except ImportError as error:
        raise CalibrationError(
            f"cannot be streamed: a library is missing ({error})",
            where=where,
            expected="the libraries `datasets` and `huggingface_hub`",
            next_step=f"pip install datasets, or {INSTEAD}",
        ) from error
    except Exception as error:  # httpx's, the hub's and OSErrors have no parent in common
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise CalibrationError(
            f"cannot be streamed from the hub: {said}",
            where=where,
            expected="a network, and a data set of that name that may be read",
            next_step=f"check the name and the network, or {INSTEAD}",
        ) from error


def _unlike(problem: str, where: str, fields: tuple[str, ...]) -> CalibrationError:
    return CalibrationError(
        f"the row {problem}",
        where=where,
        expected=f"text in {', '.join(fields)}",
        next_step=f"name a data set of the right format, or {INSTEAD}",
    )
