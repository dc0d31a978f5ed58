"""A read-only memory map that gives its pages back after every block, so that RSS does not grow with the file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from gemma_deploy.errors import CheckpointError
from gemma_deploy.reading import open_regular

PIECE_BYTES = 4 << 20  # what is resident of the map at one moment
# A fault maps the neighbours that are in the page cache too (Linux: 64 KiB around it): also those given back just
# before. Unless they go as well, 2 % of a file stays resident (396 MiB of a 17 GB checkpoint).
AROUND_BYTES = 1 << 20


class MappedFile:
    """Bytes of one file, copied out block by block. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Map the file; no page is read yet."""
        self.path = path
        try:
            with open_regular(path) as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise CheckpointError("the file is empty", where=str(path), next_step="copy or download it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}",
                where=str(path),
                next_step="make it a file that you may read, or copy it again",
            ) from error

    def view(self, start: int, stop: int, dtype: DTypeLike = np.uint8) -> np.ndarray:
        """A window on the map, valid until `release`; copy or convert it before letting go."""
        self._check(stop)
        kind = np.dtype(dtype)
        return np.frombuffer(self._map, kind, (stop - start) // kind.itemsize, start)

    def release(self, start: int, stop: int) -> None:
        """Give the pages of [start, stop) back to the system; they stay in its page cache."""
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            first = max(start - start % mmap.PAGESIZE - AROUND_BYTES, 0)
            self._map.madvise(mmap.MADV_DONTNEED, first, min(stop + AROUND_BYTES, self.size) - first)

    def pieces(self, start: int, stop: int, dtype: DTypeLike) -> Iterator[tuple[int, np.ndarray]]:
        """Windows of a few MiB over [start, stop): (index of the first element, view); each is released after use."""
        width = np.dtype(dtype).itemsize
        for first in range(start, stop, PIECE_BYTES):
            last = min(first + PIECE_BYTES, stop)
            yield (first - start) // width, self.view(first, last, dtype)
            self.release(first, last)

    def copy(self, start: int, stop: int, dtype: DTypeLike = np.uint8) -> np.ndarray:
        """An array of its own; the map's pages are given back on the way."""
        out = np.empty((stop - start) // np.dtype(dtype).itemsize, dtype)
        for at, piece in self.pieces(start, stop, dtype):
            out[at : at + piece.size] = piece
        return out

    def _check(self, stop: int) -> None:
        # A file cut short while it is mapped would end the process with SIGBUS: look before touching it.
        try:
            now = os.stat(self.path).st_size
        except OSError as error:
            raise CheckpointError(
                f"vanished while it was read: {error.strerror or error}",
                where=str(self.path),
                next_step="leave the checkpoint alone while it is read, and start again",
            ) from error
        if now < self.size or stop > self.size:
            raise CheckpointError(
                f"has {now} bytes now, had {self.size} when it was opened",
                where=str(self.path),
                next_step="leave the checkpoint alone while it is read, and start again",
            )
