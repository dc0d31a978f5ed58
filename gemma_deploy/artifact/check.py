"""What a glance tells about an artifact before it is used: is its manifest complete, are its files the ones written?

`verify` goes on from here and reads every weight, as `parity` does at its end; `run` and `inspect` stop at sizes and
small files.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from gemma_deploy.artifact.manifest import MANIFEST, Artifact, refuse_problems
from gemma_deploy.artifact.schema import File, Inside, manifest_problems
from gemma_deploy.errors import ArtifactError
from gemma_deploy.params import damaged_rows
from gemma_deploy.reading import open_regular

PARAMS = "params.safetensors"
ROWS = "rows:"  # instead of a sha256: the parameter file's rows carry one each


def open_whole(path: str | Path, *, hashes: bool = False) -> Artifact:
    """Open an artifact for use.

    Args:
        hashes: compare the small files' as well; weights are `verify`'s work.

    Raises:
        ArtifactError: its manifest is damaged, or a file that is there is not the one that was written. What is missing
            is left to whoever needs it.
    """
    artifact = open_complete(path)
    refuse(artifact, file_problems(artifact, hashes=hashes, missing=False))
    return artifact


def open_complete(path: str | Path) -> Artifact:
    """Open an artifact whose manifest has every key that the commands read.

    Raises:
        ArtifactError: naming every key that is missing, of another type, or leads out of the artifact; or links that
            do.
    """
    _refuse_links(Path(path))
    artifact = Artifact.open(path)
    refuse_problems(artifact.path / MANIFEST, manifest_problems(artifact.manifest))
    return artifact


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


def files_of(artifact: Artifact) -> dict[str, int] | None:
    """Path in the artifact -> bytes of every file that the manifest lists, None where that list is damaged."""
    try:
        listed = _FILES.validate_python(artifact.manifest.get("files"))
    except ValidationError:
        return None
    return {name: facts.bytes for name, facts in listed.items()}


_FILES = TypeAdapter(dict[Inside, File])


def file_problems(artifact: Artifact, *, hashes: bool = True, missing: bool = True) -> list[str]:
    """Which files are not what the manifest says; the parameter file by its size."""
    problems = []
    for name, facts in artifact.manifest["files"].items():
        file = artifact.path / name
        if not file.is_file():
            problems += [f"{name} is missing"] if missing else []
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {facts['bytes']}")
        elif hashes and not facts["sha256"].startswith(ROWS) and _sha256(file) != facts["sha256"]:
            problems.append(f"{name}: sha256 differs from the manifest")
    return problems


def byte_problems(artifact: Artifact) -> list[str]:
    """Which files that are there, and which tensors, are not byte for byte what was written."""
    rows: list[str] = []
    for name, table in artifact.params.files.items():
        rows += damaged_rows(artifact.path / name, table) if (artifact.path / name).is_file() else []
    return list(dict.fromkeys([*file_problems(artifact, missing=False), *rows]))


def refuse(artifact: Artifact, problems: list[str]) -> None:
    """Raise when there are any.

    Raises:
        ArtifactError: with all of them.
    """
    if problems:
        raise ArtifactError(
            f"damaged: {len(problems)} problem(s)",
            where=str(artifact.path),
            problems=problems,
            next_step="compile the recipe again with --force",
        )


def _sha256(file: Path) -> str:
    with open_regular(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
