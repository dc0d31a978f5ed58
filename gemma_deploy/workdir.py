"""Directories and files that are there whole or not at all, whenever the program or the machine stops.

A directory NAME is written as NAME.partial, which holds a mark of who writes it, and gets its name when all of it is on
the disk. Beside it there may be, each for a moment or after a kill:

    .NAME.gemma-deploy-lock    held by the process at work
    .NAME.gemma-deploy-new     NAME.partial before it has its mark
    .NAME.gemma-deploy-old     the directory that is being replaced, whole; it comes back unless the new one is in place
    .NAME.gemma-deploy-trash   what is being deleted

Single files: writing.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gemma_deploy.errors import BusyError, DeployError, UsageError
from gemma_deploy.reading import NotJsonError, open_regular, parse_json, why_impossible
from gemma_deploy.writing import PARTIAL, remove_leftovers, sync, sync_tree, write_json

MARK = ".gemma-deploy-mark"  # in NAME.partial; a kill may leave it in NAME, where it does no harm
MARK_BYTES = 65536
MOST_LEVELS = 100
_LOCK, _NEW, _OLD, _TRASH = (f".gemma-deploy-{name}" for name in ("lock", "new", "old", "trash"))
# What a disk refuses a program that has no bug.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class Lock:
    """An exclusive lock on a directory, as a file beside it that holds the id of the process.

    Args:
        place: the directory, there or not.

    Raises:
        BusyError: another process has it. OSError: the file cannot be made.
    """

    def __init__(self, place: Path) -> None:
        self.file = _beside(place, _LOCK)
        while True:
            self._fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
                os.close(self._fd)
                if not isinstance(error, BlockingIOError):
                    raise
                raise BusyError(
                    f"another run is writing it (process {holder or 'unknown'} is running)",
                    where=str(place),
                    next_step="wait for it to end, or write to another place",
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
        self.file.unlink(missing_ok=True)
        os.close(self._fd)

    def _is_the_file(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), self.file.stat())
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Maker:
    """Who makes directories of one kind, and how to speak about it.

    Args:
        command: `stage`, `split`, ...; stands in the mark.
        error: the class of errors of the disk.
        advice: what to do when the disk refuses; full: when it is full, `advice` where this is empty.
    """

    command: str
    error: type[DeployError] = DeployError
    advice: str = "make room there or allow writing, or name another directory"
    full: str = ""

    def disk_error(self, error: OSError, place: Path) -> DeployError:
        """A sentence for what the disk said about `place`, or the file that the error names."""
        file = error.filename2 or error.filename  # of two, the second is the one that is written (copies, renames)
        named = isinstance(file, str | bytes | os.PathLike)
        return self.error(
            f"cannot be written: {error.strerror or error}",
            where=os.fsdecode(file) if named else str(place),
            next_step=(error.errno in _FULL and self.full) or self.advice,
        )


class WorkDir:
    """NAME.partial while it is written, then NAME; a context manager. `publish` is the last step.

    Args:
        out: NAME.
        maker: who writes it.
        key: everything that the content depends on. What a killed run left under the same key is continued, and put in
            place at once where it was whole. None: every run begins with an empty directory, and leaves none behind.

    Attributes:
        path: where to write.
        finished: NAME is what would be made: there is nothing to write.

    Raises:
        UsageError: `out` has no name of its own; whatever `check` raises.
        BusyError: another process is at work on it.
        DeployError: NAME.partial is a stranger's. maker.error: the disk refuses.
    """

    def __init__(self, out: Path, maker: Maker, *, key: str | None = None) -> None:
        self.out, self.maker, self.key = with_a_name(out), maker, key
        self.path = partial_of(self.out)
        self.finished = False
        self._old, self._trash = _beside(self.out, _OLD), _beside(self.out, _TRASH)
        self._claimed = self._replaces = False
        self._lock: Lock | None = None

    def check(self) -> None:
        """Look at NAME, under the lock: set `finished`, or raise when it must not be replaced."""

    def tidy(self) -> None:
        """Remove from the whole NAME.partial what is only there to continue after a kill; may be called twice."""

    def is_whole(self) -> bool:
        """Whether NAME.partial, which was whole and of our key when its run was killed, is what would be made."""
        return True

    def begin(self) -> None:
        """Prepare NAME.partial, new or continued."""

    def in_order(self) -> bool:
        """Whether NAME is as a run left it that came to its end; to be asked without the lock."""
        return _is_there(self.out) and not _is_there(self._old) and not _is_there(self.out / MARK)

    def __enter__(self) -> Self:
        """Take the lock; see what is there; begin or continue NAME.partial, unless `finished`."""
        try:
            make_directories(self.out.parent)
            self._lock = Lock(self.out)
            try:
                self._prepare()
            except BaseException:
                self._release()
                raise
        except OSError as error:
            raise self.maker.disk_error(error, self.out.parent) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave what can be continued and delete what cannot; explain a disk that refuses."""
        try:
            if self._claimed and self.key is None and _is_there(self.path):
                with contextlib.suppress(OSError):  # a disk that refuses; the next run deletes it
                    self._delete(self.path)
        finally:
            self._release()
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise self.maker.disk_error(error, self.path) from error

    def publish(self) -> None:
        """Bring NAME.partial to the disk, then put it in the place of NAME.

        Killed at any moment, NAME is the old one or the new one, or the next run puts one of them there.
        """
        remove_leftovers(self.path)
        sync_tree(self.path)
        self._write_mark(self.path, whole=True)
        self._put_in_place()

    def _prepare(self) -> None:
        mark = self._read_mark()
        same = mark is not None and self.key is not None and mark.get("key") == self.key
        if mark is not None and same and mark.get("whole") is True and self.is_whole():
            self._replaces = _is_there(self.out)
            if self._replaces:
                self.check()
            if not self.finished:
                self._put_in_place()
                self.finished = True
            return
        self._recover()
        self.check()
        if not self.finished:
            self._claim(ours=mark is not None, same=same)

    def _claim(self, *, ours: bool, same: bool) -> None:
        """Continue NAME.partial, or begin a new one in its place."""
        self._replaces = _is_there(self.out)
        if same:
            self._write_mark(self.path, whole=False)
        else:
            if ours:
                self._delete(self.path)
            else:
                self.refuse_strangers()
            # Marked before it has its name: what has that name and no mark is never ours.
            fresh = _beside(self.out, _NEW)
            _remove(fresh)
            fresh.mkdir()
            self._write_mark(fresh, whole=False)
            fresh.rename(self.path)
        self._claimed = True
        self.begin()

    def refuse_strangers(self) -> None:
        """Refuse a NAME.partial that is somebody else's; changes nothing.

        Raises:
            DeployError: it is.
        """
        if self._read_mark() is None and _is_there(self.path) and not _is_empty(self.path):
            raise DeployError(
                f"is in the way of an unfinished directory, and {self.maker.command} did not make it; it will not "
                "be touched",
                where=str(self.path),
                next_step="rename or remove it yourself, or write to another place",
            )

    def _put_in_place(self) -> None:
        self.tidy()
        sync_tree(self.path)
        if _is_there(self.out):
            if not self._replaces:
                raise UsageError(
                    "appeared while it was being made; it will not be touched",
                    where=str(self.out),
                    next_step="move it away and run the same command again",
                )
            self._recover()
            self.out.rename(self._old)
        self.path.rename(self.out)
        sync(self.out.parent)
        self._recover()

    def _recover(self) -> None:
        """Clear up after `_put_in_place`, done or killed: the old NAME goes where there is a new one, or comes back."""
        if _is_there(self._old):
            if _is_there(self.out):
                self._delete(self._old)
            else:
                self._old.rename(self.out)
                sync(self.out.parent)
        _remove(self._trash)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (self.out / MARK).unlink()

    def _delete(self, path: Path) -> None:
        """Rename, then delete: a deletion that is cut short leaves nothing that could be taken for something else."""
        _remove(self._trash)
        path.rename(self._trash)
        _remove(self._trash)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def _made_by(self) -> str:
        return f"gemma-deploy {self.maker.command}"

    def _write_mark(self, folder: Path, *, whole: bool) -> None:
        write_json(folder / MARK, {"made_by": self._made_by, "key": self.key, "whole": whole})

    def _read_mark(self) -> dict[str, Any] | None:
        """The mark in NAME.partial, None where there is none of this maker."""
        try:
            with open_regular(self.path / MARK) as file:
                mark = parse_json(file.read(MARK_BYTES))
        except (OSError, NotJsonError, UnicodeDecodeError):
            return None
        return mark if isinstance(mark, dict) and mark.get("made_by") == self._made_by else None


def is_temporary(place: Path) -> bool:
    """Whether a directory is unfinished, or waits to be deleted or put back."""
    beside = place.name.startswith(".") and place.name.endswith((_NEW, _OLD, _TRASH))
    return beside or place.name.endswith(PARTIAL)


def with_a_name(out: Path) -> Path:
    """A path whose last part is the directory's own name, which `.` and `..` are not.

    Raises:
        UsageError: it is the root of the file system.
    """
    if out.name in ("", ".."):
        out = Path(os.path.realpath(out))
    if not out.name:
        raise UsageError("is no place for a new directory", where=str(out), next_step="name a directory in it")
    return out


def refuse_directory(out: Path, option: str) -> None:
    """See that a directory can be made at a path, before the work whose result it is to hold.

    Args:
        out: the path.
        option: what the user named it with.

    Raises:
        UsageError: it is the root of the file system, or no possible path.
    """
    what = why_impossible(_beside(with_a_name(out), max(_LOCK, _NEW, _OLD, _TRASH, key=len)))
    if what:
        raise UsageError(
            what,
            where=f"{str(out)[:200]}{'...' * (len(str(out)) > 200)}",
            expected="the path of a directory, such as results/NAME",
            next_step=f"name another with {option}",
        )


def partial_of(out: Path) -> Path:
    """Where a directory is while it is being written.

    Raises:
        UsageError: it is the root of the file system.
    """
    out = with_a_name(out)
    return out.with_name(out.name + PARTIAL)


def make_directories(path: Path) -> None:
    """`path` and the missing directories above it, on the disk.

    Raises:
        UsageError: there are more than `MOST_LEVELS`. OSError: one of them cannot be made.
    """
    missing, place = [], path
    while not os.path.isdir(place):
        missing.append(place)
        place = place.absolute().parent
        if len(missing) > MOST_LEVELS:
            raise UsageError(
                f"more than {MOST_LEVELS} directories, one in the other, would have to be made for this",
                where=str(path),
                next_step="name a place nearer to a directory that is there",
            )
    for place in reversed(missing):
        try:
            place.mkdir()
        except FileExistsError:  # by another process just now, or it is a file
            if not os.path.isdir(place):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place)) from None
        sync(place.absolute().parent)


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}{what}")


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _remove(path: Path) -> None:
    """Delete a file or a directory, if it is there; a link, but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
