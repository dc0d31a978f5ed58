"""The directory an artifact grows in: NAME.partial until the manifest is written, then NAME (workdir.py).

Killed at any moment, the next run continues in NAME.partial: each stage knows its own work by its own key, so that
other inputs cost those stages alone that read them. A finished artifact that lacks nothing but a measurement keeps its
files: they are linked into NAME.partial and none is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Self

from gemma_deploy.artifact.check import ROWS, sizes_match
from gemma_deploy.artifact.manifest import FileFacts, Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.errors import ArtifactError
from gemma_deploy.names import MANIFEST
from gemma_deploy.workdir import MARK, Maker, WorkDir
from gemma_deploy.writing import PARTIAL, write_json

COMPILE = Maker(
    "compile",
    advice="set workspace.path (or --out) to a directory you may write to",
    full="free space and run the same command again; it continues where it stopped",
)
LAYOUT = "1"  # of NAME.partial: another version's is not continued
# Progress marks of a compile; not part of an artifact.
SCAFFOLD = ("params.journal", "graphs.done", "rescaling.json", "sensitivity.json")
SCAFFOLD_FOLDER = "quantized"


class ArtifactDir(WorkDir):
    """Context manager around one compile.

    Args:
        out: where the finished artifact goes.
        key: of everything it holds but what is measured about it.
        wanted: measurement -> its key; a finished artifact has to have them all.
        force: replace a finished artifact that was made from other inputs.

    Attributes:
        path: the directory to work in.
        finished: `out` is what would be made; nothing is to be done.
        manifest: of the finished artifact.
        known: of a finished artifact that lacks only something wanted, whose files are in `path` already; else None.

    Raises:
        ArtifactError: `out` is finished with another key and `force` is off, or is no artifact.
        BusyError: another process is at work on it.
        DeployError: NAME.partial is a stranger's; the workspace cannot be written to, or the disk is full.
    """

    def __init__(self, out: Path, *, key: str, wanted: Mapping[str, str] | None = None, force: bool = False) -> None:
        super().__init__(out, COMPILE, key=LAYOUT)
        self.made_from, self.wanted, self.force = key, dict(wanted or {}), force
        self.known: Manifest | None = None

    def is_up_to_date(self) -> bool:
        """Whether `out` is what would be made, so that there is nothing to do; sets `known` otherwise.

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

    def commit(self, manifest: Manifest, files: Collection[str]) -> None:
        """Hash the files, write the manifest last, and rename NAME.partial to NAME.

        Killed in between, the next run finds a whole manifest and does the rest.

        Args:
            files: by their path in the artifact; what else is there is of other inputs, and goes.
        """
        for half in self.path.rglob(f"*{PARTIAL}"):  # of a run that was killed while it wrote
            half.unlink()
        self._clear(keep={*files, MANIFEST, MARK})
        # Stand for the parameter files: their rows carry a hash each, hashing them whole would read it all twice.
        params = {file: ROWS + table.digest for file, table in manifest.table.files.items()}
        facts = {}
        for name in sorted(files):
            file = self.path / name
            facts[name] = FileFacts(bytes=file.stat().st_size, sha256=params.get(name) or _sha256(file))
        write_json(self.path / MANIFEST, manifest.but(files=facts).to_json())
        self.publish()

    def tidy(self) -> None:
        """Remove the files that only the making of the artifact needed."""
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
        """What is not finished has no manifest; what is known has its files."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        if self.known is None:
            return
        self._clear(keep={MARK})
        for name in self.known.files:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.out / name, target)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.out / name, target)

    def check(self) -> None:
        """Look at `out`, and refuse what must not be replaced."""
        self.known = None
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
        elif self._is_of_these_inputs(found):
            self.known = found.manifest
        else:
            raise ArtifactError(
                "holds an artifact of other inputs (recipe, checkpoint, program or library versions), or a damaged one",
                where=str(self.out),
                next_step="use --force to replace it, or give the recipe another name",
            )

    def _is_of_these_inputs(self, artifact: Artifact) -> bool:
        return artifact.manifest.key == self.made_from and sizes_match(artifact)

    def _fits(self, artifact: Artifact) -> bool:
        keys = artifact.manifest.keys
        measured = all(keys.get(name) == key for name, key in self.wanted.items())
        return measured and self._is_of_these_inputs(artifact)

    def _clear(self, keep: Collection[str]) -> None:
        """Remove every file but those, the scaffold, and folders that are left empty."""
        for file in sorted(self.path.rglob("*"), reverse=True):  # what a folder holds before the folder
            name = file.relative_to(self.path).as_posix()
            if name in keep or file.name in SCAFFOLD or name.split("/")[0] == SCAFFOLD_FOLDER:
                continue
            if file.is_dir() and not file.is_symlink():
                with contextlib.suppress(OSError):  # not empty
                    file.rmdir()
            else:
                file.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
