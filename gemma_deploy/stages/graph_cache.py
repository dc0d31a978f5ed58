"""Graphs of earlier compiles: they hold no weight, so every checkpoint of a shape has the same ones.

A file per key, written under another name and renamed, under the folder that `folder_of_user` says. What cannot be
read, or is not what its checksums say, is made again. The folder keeps to `MOST_BYTES`: what was not used for longest
goes first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from gemma_deploy.reading import expand

log = logging.getLogger(__name__)

VARIABLE = "GEMMA_DEPLOY_CACHE"
OFF = "off"
MOST_BYTES = 256 << 20
MOST_GRAPH_BYTES = 512 << 20  # of one graph, unpacked: what claims to be larger is not ours
SUFFIX = ".graphs"


def folder_of_user() -> Path | None:
    """`GEMMA_DEPLOY_CACHE` (`off`: no cache), else gemma-deploy/ in `XDG_CACHE_HOME` or in ~/.cache."""
    given = os.environ.get(VARIABLE, "")
    if given == OFF:
        return None
    if given:
        return expand(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The specification of XDG: a path that is not absolute is ignored.
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gemma-deploy"
    except RuntimeError:  # a user without a home
        return None


class GraphCache:
    """Sets of .onnx files by key.

    Args:
        folder: where they lie; None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder / "graphs"

    @classmethod
    def of_user(cls) -> GraphCache:
        """The one of whoever runs this."""
        return cls(folder_of_user())

    def get(self, key: str, names: Sequence[str]) -> dict[str, bytes] | None:
        """The files of a key, None where they are not there, damaged, or not these."""
        if self.folder is None:
            return None
        file = self.folder / (key + SUFFIX)
        try:
            with zipfile.ZipFile(file) as packed:
                entries = packed.infolist()
                if sorted(entry.filename for entry in entries) != sorted(names):
                    return None
                if sum(entry.file_size for entry in entries) > MOST_GRAPH_BYTES:
                    return None
                found = {name: packed.read(name) for name in names}
            os.utime(file)
        except (FileNotFoundError, NotADirectoryError):  # `put` tells why nothing can be kept there
            return None
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            log.info("graphs in %s cannot be used and are made again: %s", file, getattr(error, "strerror", 0) or error)
            return None
        return found

    def put(self, key: str, files: Mapping[str, bytes]) -> None:
        """Keep files; a folder that cannot be written to is no reason to fail."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            try:
                with os.fdopen(handle, "wb") as out:
                    _pack(files, out)
                os.replace(partial, self.folder / (key + SUFFIX))
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
                raise
            self._shrink()
        except OSError as error:
            log.info(
                "graphs cannot be kept in %s: %s; set %s to a folder that you may write to, or to %s",
                self.folder,
                error.strerror or error,
                VARIABLE,
                OFF,
            )

    def _shrink(self) -> None:
        assert self.folder is not None
        known = []
        for file in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process is at it
                stat = file.stat()
                known.append((stat.st_mtime, stat.st_size, file))
        total = sum(size for _, size, _ in known)
        for _, size, file in sorted(known):
            if total <= MOST_BYTES:
                break
            file.unlink(missing_ok=True)
            total -= size


def _pack(files: Mapping[str, bytes], out: BinaryIO) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name, graph in files.items():
            packed.writestr(name, graph)
