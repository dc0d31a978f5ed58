"""A finished artifact, read back: its manifest whole, and nothing outside its directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gemma_deploy import reading
from gemma_deploy.artifact.manifest import FORMAT_VERSION, Manifest
from gemma_deploy.bounds import lines_of
from gemma_deploy.errors import ArtifactError, NoArtifactError, UsageError
from gemma_deploy.names import CONFIG, MANIFEST, PARAMETER_FILES
from gemma_deploy.workdir import is_temporary

MOST_NAMES = 20  # of a workspace
MANIFEST_FILE = reading.FileKind(
    error=ArtifactError,
    expected="what `gemma-deploy compile` wrote",
    next_step="compile the recipe again with --force",
    unreadable="allow reading it, or compile the recipe again under another name",
    whole_characters=True,
)


@dataclass(frozen=True)
class Artifact:
    """An artifact that says it is finished."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read the manifest; whether the files are those that were written is check.py's work.

        Raises:
            ArtifactError: there is none, another version wrote it, or it is damaged: naming every key that is missing,
                of another type, or leads out of the artifact; or links that do. NoArtifactError: nothing is there.
        """
        path = Path(path)
        if path.suffix.lower() == ".gguf" and reading.is_file(path):
            raise _is_a_checkpoint(path)
        if not reading.is_dir(path):
            absent = reading.why_absent(path) or "it is no directory"
            nothing = absent == reading.NOWHERE
            raise (NoArtifactError if nothing else ArtifactError)(
                "there is no such directory" if nothing else absent,
                where=str(path),
                expected="an artifact made by `gemma-deploy compile`",
                next_step="list the workspace, or compile a recipe first",
            )
        file = path / MANIFEST
        if not reading.exists(file):
            if reading.exists(path / CONFIG) and not any(reading.exists(path / name) for name in PARAMETER_FILES):
                raise _is_a_checkpoint(path)
            if held := _artifacts_in(path):
                raise ArtifactError(
                    "this is a workspace, not an artifact",
                    where=str(path),
                    problems=[f"it holds {name}" for name in held],
                    next_step=f"name one of them, such as {path / held[0]}",
                )
            raise ArtifactError(
                f"{MANIFEST} is missing: this is no finished artifact",
                where=str(path),
                next_step="compile the recipe again; it continues where it stopped",
            )
        _refuse_links(path)
        return cls(path, manifest_of(file))


def _is_a_checkpoint(path: Path) -> ArtifactError:
    return ArtifactError(
        "this is a checkpoint, not an artifact",
        where=str(path),
        expected="an artifact made by `gemma-deploy compile`",
        next_step=f"compile it first: gemma-deploy compile cpu-int8 --checkpoint {path} (or another of "
        "`gemma-deploy recipes`)",
    )


def _artifacts_in(folder: Path) -> list[str]:
    """Names of the finished artifacts that a workspace holds."""
    return sorted(file.parent.name for file in folder.glob(f"*/{MANIFEST}") if not is_temporary(file.parent))[
        :MOST_NAMES
    ]


def manifest_of(file: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ArtifactError: see `Artifact.open`.
    """
    values = reading.read_object(file, MANIFEST_FILE)
    found = values.get("format_version")
    if found != FORMAT_VERSION:
        raise ArtifactError(
            f"format_version is {found!r}",
            where=str(file),
            expected=str(FORMAT_VERSION),
            next_step="compile the recipe with this version of gemma-deploy, or use the version that made it",
        )
    try:
        return Manifest.of(values)
    except ValidationError as error:
        problems = lines_of(error)
    refuse_problems(file, problems)
    raise AssertionError(file)  # never reached: there were problems


def refuse_problems(file: Path, problems: list[str]) -> None:
    """Raise when a file of an artifact does not hold what it should.

    Args:
        file: for the message.
        problems: a line for each key.

    Raises:
        ArtifactError: with all of them.
    """
    if problems:
        raise ArtifactError(
            "is damaged",
            where=str(file),
            problems=problems,
            expected="what `gemma-deploy compile` wrote",
            next_step="copy the artifact again, or compile the recipe again with --force",
        )


def newest_artifact(workspace: Path) -> Path:
    """The finished artifact with the youngest manifest.

    Raises:
        UsageError: the workspace holds none.
    """
    found = sorted(workspace.glob(f"*/{MANIFEST}"), key=lambda file: file.stat().st_mtime_ns)
    found = [file for file in found if not is_temporary(file.parent)]
    if not found:
        raise UsageError(
            "no finished artifact in the workspace",
            where=str(workspace),
            next_step="name an artifact, or run `gemma-deploy compile RECIPE` first",
        )
    return found[-1].parent


def _refuse_links(path: Path) -> None:
    """Let no link stand for a file elsewhere, before anything is read.

    Raises:
        ArtifactError: naming all links that lead out of the artifact.
    """
    root = os.path.realpath(path)
    found = []
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            entry = os.path.join(place, name)
            if os.path.islink(entry) and os.path.commonpath((root, os.path.realpath(entry))) != root:
                found.append(f"{os.path.relpath(entry, root)} leads to {os.path.realpath(entry)}")
    if found:
        raise ArtifactError(
            "links lead out of it",
            where=str(path),
            problems=sorted(found),
            expected="an artifact whose files are in its directory",
            next_step="copy it with what the links lead to (cp -rL), if you trust that",
        )
