"""manifest.json: what an artifact is, and reading it back (design 4.4)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx

from gemma_deploy import reading
from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.params import ParamTable
from gemma_deploy.workdir import is_temporary

FORMAT_VERSION = 2  # 2: parts, and the file of every row
MANIFEST = "manifest.json"
MANIFEST_FILE = reading.FileKind(
    error=ArtifactError,
    expected="what `gemma-deploy compile` wrote",
    next_step="compile the recipe again with --force",
    unreadable="allow reading it, or compile the recipe again under another name",
    whole_characters=True,
)
# Whose versions decide what a graph looks like or how weights are rounded.
TOOLS = ("gemma-deploy", "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxsim", "onnxruntime")


def tool_versions() -> dict[str, str]:
    """Versions of this program and of the libraries an artifact depends on."""
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            found[tool] = "not installed"
    return found


def op_census(path: Path) -> dict[str, int]:
    """Number of nodes per operator of an .onnx file, those of branches too, custom ones with their domain."""
    counts: Counter[str] = Counter()
    graphs = [onnx.load(str(path), load_external_data=False).graph]
    while graphs:
        for node in graphs.pop().node:
            counts[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
            graphs += [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return dict(sorted(counts.items()))


@dataclass(frozen=True)
class Artifact:
    """An artifact that says it is finished."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read the manifest; hashes are `verify`'s work.

        Raises:
            ArtifactError: there is none, it is damaged, or another version wrote it.
        """
        path = Path(path)
        if not reading.is_dir(path):
            absent = reading.why_absent(path) or "it is no directory"
            raise ArtifactError(
                "there is no such directory" if absent == reading.NOWHERE else absent,
                where=str(path),
                expected="an artifact made by `gemma-deploy compile`",
                next_step="list the workspace, or compile a recipe first",
            )
        file = path / MANIFEST
        if not reading.exists(file):
            raise ArtifactError(
                f"{MANIFEST} is missing: this is no finished artifact",
                where=str(path),
                next_step="compile the recipe again; it continues where it stopped",
            )
        manifest = reading.read_object(file, MANIFEST_FILE)
        found = manifest.get("format_version")
        if found != FORMAT_VERSION:
            raise ArtifactError(
                f"format_version is {found!r}",
                where=str(file),
                expected=str(FORMAT_VERSION),
                next_step="compile the recipe with this version of gemma-deploy, or use the version that made it",
            )
        missing = [key for key in ("name", "scheme", "contract", "params", "files", "model") if key not in manifest]
        if missing:
            raise ArtifactError(
                "keys are missing",
                where=str(file),
                problems=missing,
                next_step="copy the artifact again, or compile the recipe again with --force",
            )
        return cls(path, manifest)

    @property
    def params(self) -> ParamTable:
        """Rows of params.safetensors."""
        return ParamTable.from_json(self.manifest["params"])


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
