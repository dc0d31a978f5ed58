"""The directory an artifact grows in: NAME.partial until the manifest is written, then NAME (workdir.py).

Killed at any moment, the next run with the same inputs continues in NAME.partial; with other inputs it starts afresh.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Self

from gemma_deploy.artifact.check import ROWS, sizes_match
from gemma_deploy.artifact.manifest import MANIFEST, FileFacts, Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.errors import ArtifactError
from gemma_deploy.workdir import MARK, Maker, WorkDir
from gemma_deploy.writing import PARTIAL, write_json

COMPILE = Maker(
    "compile",
    advice="set workspace.path (or --out) to a directory you may write to",
    full="free space and run the same command again; it continues where it stopped",
)
# Progress marks of a compile; not part of an artifact.
SCAFFOLD = ("params.journal", "graphs.done", "rescaling.json", "sensitivity.json")
SCAFFOLD_FOLDER = "quantized"


class ArtifactDir(WorkDir):
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
        ArtifactError: `out` is finished with another key and `force` is off, or is no artifact.
        BusyError: another process is at work on it.
        DeployError: NAME.partial is a stranger's; the workspace cannot be written to, or the disk is full.
    """

    def __init__(self, out: Path, *, key: str, force: bool = False, proven: bool = False) -> None:
        super().__init__(out, COMPILE, key=key)
        self.force, self.proven = force, proven

    def is_up_to_date(self) -> bool:
        """Whether `out` is what would be made, so that there is nothing to do.

        Raises:
            ArtifactError: `out` must not be replaced.
        """
        if self.in_order():
            self.check()
        return self.finished

    @cached_property
    def manifest(self) -> Manifest:
        """Of the finished artifact."""
        return Artifact.open(self.out).manifest

    def __enter__(self) -> Self:
        """Find out what is there: the finished artifact, an unfinished one to continue, or nothing."""
        return self if self.is_up_to_date() else super().__enter__()

    def commit(self, manifest: Manifest) -> None:
        """Hash the files, write the manifest last, and rename NAME.partial to NAME.

        Killed in between, the next run finds a whole manifest and does the rest.
        """
        # Stand for the parameter files: their rows carry a hash each, hashing them whole would read it all twice.
        params = {file: ROWS + table.digest for file, table in manifest.table.files.items()}
        files = {}
        for half in self.path.rglob(f"*{PARTIAL}"):  # of a run that was killed while it wrote
            half.unlink()
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if name.split("/")[0] == SCAFFOLD_FOLDER:
                continue
            if file.is_file() and file.name not in (MANIFEST, MARK, *SCAFFOLD):
                files[name] = FileFacts(bytes=file.stat().st_size, sha256=params.get(name) or _sha256(file))
        write_json(self.path / MANIFEST, manifest.but(files=files).to_json())
        self.publish()

    def tidy(self) -> None:
        """Remove the scaffold."""
        for file in [file for file in self.path.rglob("*") if file.name in SCAFFOLD]:
            file.unlink()
        shutil.rmtree(self.path / SCAFFOLD_FOLDER, ignore_errors=True)

    def is_whole(self) -> bool:
        """Whether the artifact in NAME.partial needs only its name."""
        try:
            return not self.force and self._fits(Artifact.open(self.path))
        except ArtifactError:
            return False

    def begin(self) -> None:
        """What is not finished has no manifest."""
        (self.path / MANIFEST).unlink(missing_ok=True)

    def check(self) -> None:
        """Look at `out`, and refuse what must not be replaced."""
        if not os.path.lexists(self.out):
            return
        if not (self.out / MANIFEST).exists():
            raise ArtifactError(
                "exists and is no artifact; it will not be touched",
                where=str(self.out),
                next_step="choose another name or --out, or remove it yourself",
            )
        if self.force:
            return
        found = Artifact.open(self.out)
        if self._fits(found):
            self.finished = True
        elif found.manifest.key != self.key or not sizes_match(found):
            raise ArtifactError(
                "holds an artifact of other inputs (recipe, checkpoint, program or library versions), or a damaged one",
                where=str(self.out),
                next_step="use --force to replace it, or give the recipe another name",
            )

    def _fits(self, artifact: Artifact) -> bool:
        proven = artifact.manifest.parity is not None or not self.proven
        return artifact.manifest.key == self.key and proven and sizes_match(artifact)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
