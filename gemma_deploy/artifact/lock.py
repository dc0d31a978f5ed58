"""One compile per artifact name: a lock file beside it that dies with its process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from gemma_deploy.errors import ArtifactError


class Lock:
    """An exclusive lock on `.NAME.lock`; holds the process id of whoever has it.

    Args:
        path: the lock file; it is removed when the lock is given back.

    Raises:
        ArtifactError: another process has it; OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
                os.close(self._fd)
                raise ArtifactError(
                    f"another compile of it is running (process {holder or 'unknown'})",
                    where=str(path.with_name(path.name.removeprefix(".").removesuffix(".lock"))),
                    next_step="wait for it to end, or give this recipe another name",
                ) from error
            if self._is_the_file():
                break
            os.close(self._fd)  # the one before removed it between open and flock: lock what is there now
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError:  # a full disk: neither a file nor an open lock stays behind
            self.release()
            raise

    def release(self) -> None:
        """Remove the file, then let go of it."""
        self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def _is_the_file(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.stat())
        except FileNotFoundError:
            return False
