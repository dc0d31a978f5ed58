"""Hidden states of all windows between two layers: in memory when small, else in a file, read one window at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
        self, shape: tuple[int, int, int], file: Path, in_memory_bytes: int = IN_MEMORY_BYTES, *, there: bool = False
    ) -> None:
        self.shape, self.file = shape, file
        self.window_bytes = 4 * shape[1] * shape[2]
        self.nbytes = self.bytes_of(shape)
        self._array: np.ndarray | None = None
        if self.nbytes <= in_memory_bytes:
            self._array = np.zeros(shape, np.float32)
        elif not there:
            self._reserve()

    @staticmethod
    def bytes_of(shape: tuple[int, int, int]) -> int:
        """What states of this shape take."""
        return 4 * shape[0] * shape[1] * shape[2]

    @property
    def on_disk(self) -> bool:
        """Whether the states are in the file."""
        return self._array is None

    def read(self, window: int) -> np.ndarray:
        """[seqlen, hidden], a copy; of states in parts see `parts_of`."""
        if self._array is not None:
            return self._array[window].copy()
        values = np.empty(self.shape[1:], np.float32)
        with open(self.file, "rb") as file:  # not mapped: a fault for each page costs more than the copy
            file.seek(window * self.window_bytes)
            if file.readinto(values.data.cast("B")) != self.window_bytes:
                raise CalibrationError(
                    f"ends before window {window}",
                    where=str(self.file),
                    expected=f"{self.nbytes} bytes, which this run wrote",
                    next_step="leave the workspace alone while a run is using it, and start the run again",
                )
        return values

    def write(self, window: int, *parts: np.ndarray) -> None:
        """parts: [seqlen, columns] each; laid out as by `joined`."""
        if self._array is not None:
            self._array[window] = joined(parts)
            return
        with open(self.file, "r+b") as file:
            file.seek(window * self.window_bytes)
            for part in parts:
                file.write(np.ascontiguousarray(part).data.cast("B"))

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Give memory and disk back."""
        self._array = None
        self.file.unlink(missing_ok=True)

    def _reserve(self) -> None:
        """Take the blocks now, so that a full disk is known before any work."""
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


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """[seqlen, columns] each -> [seqlen, all columns], in whose memory they lie one behind the other."""
    return np.concatenate([part.ravel() for part in parts]).reshape(len(parts[0]), -1)


def parts_of(state: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """What `joined` gave, taken apart: the first part [seqlen, columns] and the second; views."""
    values, seqlen = state.reshape(-1), len(state)
    return values[: seqlen * columns].reshape(seqlen, columns), values[seqlen * columns :].reshape(seqlen, -1)
