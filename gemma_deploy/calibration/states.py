"""Hidden states of all windows between two layers: in memory when small, else in a file mapped one window at a time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from gemma_deploy.errors import CalibrationError

IN_MEMORY_BYTES = 128 << 20


class HiddenStates:
    """[nsamples, seqlen, hidden] float32, read and overwritten window by window.

    Args:
        shape: nsamples, seqlen, hidden (or what a token is inside a layer, see segments.py).
        file: made when the array is larger than `in_memory_bytes`, and deleted by `close`.
        there: the file holds the states already.

    Raises:
        CalibrationError: the disk has no room for it.
    """

    def __init__(
        self, shape: tuple[int, int, int], file: Path, in_memory_bytes: int = IN_MEMORY_BYTES, there: bool = False
    ) -> None:
        self.shape, self.file = shape, file
        self.window_bytes = 4 * shape[1] * shape[2]
        self.nbytes = shape[0] * self.window_bytes
        self._array: np.ndarray | None = None
        if self.nbytes <= in_memory_bytes:
            self._array = np.zeros(shape, np.float32)
        elif not there:
            self._reserve()

    @property
    def on_disk(self) -> bool:
        """Whether the states are in the file."""
        return self._array is None

    def read(self, window: int) -> np.ndarray:
        """[seqlen, hidden], a copy."""
        return self._view(window).copy()

    def write(self, window: int, *parts: np.ndarray) -> None:
        """parts: [seqlen, columns] each, side by side."""
        np.concatenate(parts, axis=1, out=self._view(window))

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Give memory and disk back."""
        self._array = None
        self.file.unlink(missing_ok=True)

    def _view(self, window: int) -> np.ndarray:
        if self._array is not None:
            return self._array[window]
        # Mapped anew for every window: pages that stayed mapped would count as this process's memory.
        view: np.ndarray = np.memmap(self.file, np.float32, "r+", window * self.window_bytes, self.shape[1:])
        return view

    def _reserve(self) -> None:
        """Take the blocks now: a full disk under a mapped file would end the process with SIGBUS."""
        try:
            with open(self.file, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.nbytes)
                else:
                    for _ in range(self.shape[0]):
                        file.write(b"\0" * self.window_bytes)
        except OSError as error:
            self.file.unlink(missing_ok=True)
            raise CalibrationError(
                f"no room for the hidden states of {self.shape[0]} windows: {error.strerror or error}",
                where=str(self.file),
                expected=f"{self.nbytes / 1e6:.0f} MB free, for the time of the run",
                next_step="make room there, or use another --workspace, or fewer or shorter windows",
            ) from error
