"""The directory an artifact grows in: NAME.partial until the manifest is written, then NAME.

Killed at any moment, the next run with the same inputs continues in NAME.partial; with other inputs it starts afresh.
Two runs at a time on one NAME are refused (lock.py).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from gemma_deploy.artifact.lock import Lock
from gemma_deploy.artifact.manifest import MANIFEST, Artifact, write_json
from gemma_deploy.errors import ArtifactError, DeployError

KEY_FILE = "inputs.key"
# Progress marks of a compile; not part of an artifact.
SCAFFOLD = (KEY_FILE, "params.journal", "graphs.done", "rescaling.json", "sensitivity.json")
SCAFFOLD_FOLDER = "quantized"


class ArtifactDir:
    """Context manager around one compile.

    Args:
        out: where the finished artifact goes.
        key: hash of everything it depends on.
        force: replace a finished artifact that was made from other inputs.
        proven: be content with a finished artifact only if its gate ran.

    Attributes:
        path: the directory to work in.
        finished: `out` is what would be made; nothing is to be done.
        manifest: of the finished artifact.

    Raises:
        ArtifactError: `out` is finished with another key and `force` is off; it or NAME.partial is none of ours; or
            another process is at work on it.
        DeployError: the workspace cannot be written to, or the disk is full.
    """

    def __init__(self, out: Path, *, key: str, force: bool = False, proven: bool = False) -> None:
        self.out, self.key, self.force, self.proven = out, key, force, proven
        self.path = out.with_name(out.name + ".partial")
        self._old = out.with_name(f".{out.name}.old")  # no name a recipe can have
        self.manifest: dict[str, Any] = {}
        self.finished = False
        self._lock: Lock | None = None

    def __enter__(self) -> ArtifactDir:
        """Find out what is there: the finished artifact, an unfinished one to continue, or nothing."""
        if self._is_finished() and not self._old.exists():
            return self
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.out.with_name(f".{self.out.name}.lock"))
            try:
                self._prepare()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise disk_error(error, self.out.parent) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the unfinished directory for the next run; explain a full or read-only disk."""
        if self._lock is not None:
            self._lock.release()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
            raise disk_error(error, self.out.parent) from error

    def commit(self, manifest: dict[str, Any]) -> None:
        """Hash the files, write the manifest last, and rename NAME.partial to NAME.

        Killed in between, the next run finds a whole manifest and does the rest.
        """
        params = _params_digests(manifest)
        files = {}
        for half in self.path.rglob("*.partial"):  # of a run that was killed while it wrote
            half.unlink()
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if name.split("/")[0] == SCAFFOLD_FOLDER:
                continue
            if file.is_file() and file.name not in (MANIFEST, *SCAFFOLD):
                files[name] = {"bytes": file.stat().st_size, "sha256": params.get(name) or _sha256(file)}
            _sync(file)
        write_json(self.path / MANIFEST, manifest | {"files": files})
        _sync(self.path / MANIFEST)
        _sync(self.path)
        self._publish()

    def _publish(self) -> None:
        """Put the whole NAME.partial in the place of NAME."""
        for file in [file for file in self.path.rglob("*") if file.name in SCAFFOLD]:
            file.unlink()
        shutil.rmtree(self.path / SCAFFOLD_FOLDER, ignore_errors=True)
        if self.out.exists():
            self._put_aside(self.out)
        self.path.rename(self.out)
        _sync(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def _prepare(self) -> None:
        """Under the lock: finish what only waited to be renamed, continue what has our key, or start afresh."""
        if self._is_finished():  # by another process just now, or by one that was killed before it could clear up
            shutil.rmtree(self._old, ignore_errors=True)
            return
        whole = self._readable(self.path)
        if whole is not None and self._fits(whole) and not self.force:
            self._publish()
            self._is_finished()
            return
        mark = self.path / KEY_FILE
        if self.path.exists() and not (mark.exists() and mark.read_text() == self.key):
            self._refuse_what_is_not_ours()
            self._put_aside(self.path)
            shutil.rmtree(self._old, ignore_errors=True)
        self.path.mkdir(exist_ok=True)
        (self.path / MANIFEST).unlink(missing_ok=True)
        mark.write_text(self.key)

    def _put_aside(self, path: Path) -> None:
        """Rename what is to be deleted: a deletion that is cut short leaves nothing that looks like the user's."""
        shutil.rmtree(self._old, ignore_errors=True)
        path.rename(self._old)

    def _refuse_what_is_not_ours(self) -> None:
        ours = self.path.is_dir() and (
            any((self.path / name).exists() for name in (KEY_FILE, MANIFEST)) or not any(self.path.iterdir())
        )
        if not ours:
            raise ArtifactError(
                "is in the way of an unfinished artifact and was not made by a compile; it will not be touched",
                where=str(self.path),
                next_step="rename or remove it yourself, or give the recipe another name",
            )

    def _is_finished(self) -> bool:
        """Look at `out`, and refuse what must not be replaced."""
        if not self.out.exists():
            return False
        if not (self.out / MANIFEST).exists():
            raise ArtifactError(
                "exists and is no artifact; it will not be touched",
                where=str(self.out),
                next_step="choose another name or --out, or remove it yourself",
            )
        if self.force:
            return False
        found = Artifact.open(self.out)
        if self._fits(found):
            self.finished, self.manifest = True, found.manifest
        elif found.manifest.get("key") != self.key or not _sizes_match(found):
            raise ArtifactError(
                "holds an artifact of other inputs (recipe, checkpoint, program or library versions), or a damaged one",
                where=str(self.out),
                next_step="use --force to replace it, or give the recipe another name",
            )
        return self.finished

    def _fits(self, artifact: Artifact) -> bool:
        proven = artifact.manifest.get("parity") is not None or not self.proven
        return artifact.manifest.get("key") == self.key and proven and _sizes_match(artifact)

    @staticmethod
    def _readable(path: Path) -> Artifact | None:
        try:
            return Artifact.open(path)
        except ArtifactError:
            return None


def _sizes_match(artifact: Artifact) -> bool:
    files = artifact.manifest["files"]
    return all(
        (artifact.path / name).is_file() and (artifact.path / name).stat().st_size == facts["bytes"]
        for name, facts in files.items()
    )


def disk_error(error: OSError, folder: Path) -> DeployError:
    """A sentence for what a disk can refuse."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return DeployError(
        "the disk is full" if full else f"cannot write: {error.strerror}",
        where=str(error.filename or folder),
        next_step="free space and run the same command again; it continues where it stopped"
        if full
        else "set workspace.path (or --out) to a directory you may write to",
    )


def _params_digests(manifest: dict[str, Any]) -> dict[str, str]:
    """Stand for the parameter files: their rows carry a hash each, hashing them whole would read it all twice."""
    from gemma_deploy.params import ParamTable

    return {file: "rows:" + table.digest for file, table in ParamTable.from_json(manifest["params"]).files.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
