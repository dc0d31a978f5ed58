"""What a glance tells about an artifact before it is used: are its files the ones that were written?

`verify` goes on from here and reads every weight, as `parity` does at its end; `run` and `inspect` stop at sizes and
small files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.errors import ArtifactError
from gemma_deploy.params.table import damaged_rows
from gemma_deploy.reading import open_regular

ROWS = "rows:"  # instead of a sha256: the parameter file's rows carry one each


def open_whole(path: str | Path, *, hashes: bool = False) -> Artifact:
    """Open an artifact for use.

    Args:
        hashes: compare the small files' as well; weights are `verify`'s work.

    Raises:
        ArtifactError: its manifest is damaged, or a file that is there is not the one that was written. What is missing
            is left to whoever needs it.
    """
    artifact = Artifact.open(path)
    refuse(artifact, file_problems(artifact, hashes=hashes, missing=False))
    return artifact


def sizes_match(artifact: Artifact) -> bool:
    """Whether every file is there with the size that the manifest says."""
    return not file_problems(artifact, hashes=False)


def file_problems(artifact: Artifact, *, hashes: bool = True, missing: bool = True) -> list[str]:
    """Which files are not what the manifest says; the parameter file by its size."""
    problems = []
    for name, facts in artifact.manifest.files.items():
        file = artifact.path / name
        if not file.is_file():
            problems += [f"{name} is missing"] if missing else []
        elif file.stat().st_size != facts.bytes:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {facts.bytes}")
        elif hashes and not facts.sha256.startswith(ROWS) and _sha256(file) != facts.sha256:
            problems.append(f"{name}: sha256 differs from the manifest")
    return problems


def byte_problems(artifact: Artifact) -> list[str]:
    """Which files that are there, and which tensors, are not byte for byte what was written."""
    rows: list[str] = []
    for name, table in artifact.manifest.table.files.items():
        rows += (
            damaged_rows(artifact.path / name, table, naming=artifact.manifest.naming)
            if (artifact.path / name).is_file()
            else []
        )
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
