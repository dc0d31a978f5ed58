"""Notices that weights are written to while they are in use.

They are mapped, so that whoever writes into the file changes the model that is being computed. A file that is replaced
by another of its name is not written to: what was opened stays, until it is closed. So `compile --force` harms nobody.
"""

from __future__ import annotations

import os
from io import BufferedReader
from pathlib import Path

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.errors import START_AGAIN, ChangedError
from gemma_deploy.params.table import ParamTable, damaged_rows
from gemma_deploy.reading import open_regular


class Watch:
    """The weights of an artifact as its manifest says they are; it takes microseconds to look."""

    def __init__(self, artifact: Artifact) -> None:
        self._opened: list[tuple[BufferedReader, str, ParamTable]] = []
        for name, table in artifact.manifest.table.files.items():
            path = artifact.path / name
            if path.is_file():  # what is missing is left to whoever needs it
                self._opened.append((open_regular(path), str(path), table))
        self._known = [(table.file_bytes, _facts(file.fileno())[1]) for file, _, table in self._opened]

    def check(self) -> None:
        """See that they are the same; where only the time of the last change is another, that every byte is.

        Raises:
            ChangedError: they are not.
        """
        for place, (file, path, table) in enumerate(self._opened):
            found = _facts(file.fileno())
            if found == self._known[place]:
                continue
            if found[0] != self._known[place][0] or not _sound(file.fileno(), table):
                raise ChangedError(
                    "the weights were written to while they were in use", where=path, next_step=START_AGAIN
                )
            self._known[place] = found

    def close(self) -> None:
        """Look no more."""
        for file, _, _ in self._opened:
            file.close()
        self._opened = []

    def __del__(self) -> None:
        self.close()


def _facts(descriptor: int) -> tuple[int, int]:
    """Size and time of the last change, of a file that may have no name any more."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _sound(descriptor: int, table: ParamTable) -> bool:
    return not damaged_rows(Path(f"/proc/self/fd/{descriptor}"), table)
