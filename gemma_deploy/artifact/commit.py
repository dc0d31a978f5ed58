"""The directory an artifact grows in: NAME.partial until the manifest is written, then NAME.

Killed at any moment, the next run with the same inputs continues in NAME.partial; with other inputs it starts afresh.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from gemma_deploy.artifact.manifest import MANIFEST, Artifact, write_json
from gemma_deploy.errors import ArtifactError, DeployError

KEY_FILE = "inputs.key"
# Progress marks of a compile; not part of an artifact.
SCAFFOLD = (KEY_FILE, "params.journal", "graphs.done")


class ArtifactDir:
    """Context manager around one compile.

    Args:
        out: where the finished artifact goes.
        key: hash of everything it depends on.
        force: replace a finished artifact that was made from other inputs.

    Raises:
        ArtifactError: `out` is finished with another key and `force` is off, or is no artifact at all.
        DeployError: the workspace cannot be written to, or the disk is full.
    """

    def __init__(self, out: Path, *, key: str, force: bool = False) -> None:
        self.out, self.key, self.force = out, key, force
        self.path = out.with_name(out.name + ".partial")
        self.manifest: dict[str, Any] = {}
        self.finished = False

    def __enter__(self) -> ArtifactDir:
        """Find out what is there: the finished artifact, an unfinished one to continue, or nothing."""
        if self.out.exists():
            self._look_at_existing()
        if self.finished and not self.force:
            return self
        self.finished = False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            mark = self.path / KEY_FILE
            if not mark.exists() or mark.read_text() != self.key:
                shutil.rmtree(self.path)
                self.path.mkdir()
                mark.write_text(self.key)
        except OSError as error:
            raise disk_error(error, self.out.parent) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the unfinished directory for the next run; explain a full or read-only disk."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
            raise disk_error(error, self.out.parent) from error

    def commit(self, manifest: dict[str, Any]) -> None:
        """Hash the files, write the manifest last, and rename NAME.partial to NAME."""
        for name in SCAFFOLD:
            (self.path / name).unlink(missing_ok=True)
        params = {"params.safetensors": _params_digest(manifest)}
        files = {}
        for file in sorted(self.path.iterdir()):
            if file.name != MANIFEST:
                files[file.name] = {
                    "bytes": file.stat().st_size,
                    "sha256": params.get(file.name) or _sha256(file),
                }
                _sync(file)
        write_json(self.path / MANIFEST, manifest | {"files": files})
        _sync(self.path / MANIFEST)
        _sync(self.path)
        old = self.out.with_name(self.out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            self.out.rename(old)
        self.path.rename(self.out)
        _sync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _look_at_existing(self) -> None:
        if not (self.out / MANIFEST).exists():
            raise ArtifactError(
                "exists and is no artifact; it will not be touched",
                where=str(self.out),
                next_step="choose another name or --out, or remove it yourself",
            )
        try:
            found = Artifact.open(self.out)
        except ArtifactError:
            if not self.force:
                raise
            return
        if found.manifest.get("key") == self.key and _sizes_match(found):
            self.finished, self.manifest = True, found.manifest
        elif not self.force:
            raise ArtifactError(
                "holds an artifact made from other inputs (recipe, checkpoint, program or library versions), or damaged",
                where=str(self.out),
                next_step="use --force to replace it, or give the recipe another name",
            )


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


def _params_digest(manifest: dict[str, Any]) -> str:
    """Stands for the parameter file: its rows carry a hash each, hashing it whole again would read it all twice."""
    from gemma_deploy.params import ParamTable

    return "rows:" + ParamTable.from_json(manifest["params"]).digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
