"""Adapters that are kept in an artifact: ADAPTERS/NAME holds the file that a runtime loads, and a record about it.

The record says of which artifact and of which adapter the file was made, and holds its hash: an adapter of another
artifact, or a file that has changed since, is refused before anything is computed with it. `compile` does not write
this folder, and an artifact that is compiled again is another one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from gemma_deploy import reading
from gemma_deploy.artifact.manifest import FileFacts, Record
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.bounds import Count, Size, lines_of
from gemma_deploy.errors import ArtifactError, UsageError
from gemma_deploy.graph.contract import AdapterSlots
from gemma_deploy.workdir import MARK, is_temporary

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.adapters.merging import AdapterRef

ADAPTERS = "adapters"  # the folder
RECORD = "adapter.json"
FILES = {"native": "adapter.safetensors"}  # by back end, what its runtime loads; of any other ONNX Runtime's own format
FILE = "adapter.onnx_adapter"
FORMAT_VERSION: Literal[1] = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
AGAIN = "make it again: gemma-deploy adapter ARTIFACT ADAPTER_DIR --name {}"
RECORD_FILE = reading.FileKind(
    error=ArtifactError,
    expected="what `gemma-deploy adapter` wrote",
    next_step="delete the adapter's folder, and make it again: gemma-deploy adapter ARTIFACT ADAPTER_DIR",
    unique_keys=True,
    finite=True,
    whole_characters=True,
)


class KeptRecord(Record):
    """What is known of a kept adapter.

    Args:
        artifact: key of the artifact it was made for.
        source: name of the directory it was made from; fingerprint: of what that held.
        rank: the largest of its ranks; linears: that it changes.
        file: of the runtime's file, its size and hash.
    """

    format_version: Literal[1]
    artifact: str
    source: str
    fingerprint: str
    rank: Size
    linears: Count
    file: FileFacts


@dataclass(frozen=True)
class KeptAdapter:
    """An adapter in an artifact, with its record and the file that a runtime loads."""

    name: str
    path: Path
    record: KeptRecord
    file: Path

    def check(self) -> None:
        """See that the runtime's file is the one that was written.

        Raises:
            ArtifactError: it is missing, or has changed.
        """
        if problem := self.problem():
            raise ArtifactError(problem, where=str(self.file), next_step=AGAIN.format(self.name))

    def problem(self) -> str:
        """What is wrong with the runtime's file; "" for nothing."""
        expected = self.record.file
        try:
            with reading.open_regular(self.file) as opened:
                size = self.file.stat().st_size
                if size != expected.bytes:
                    return f"has {size} bytes, expected {expected.bytes}"
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        return "" if digest == expected.sha256 else "has changed since it was made: its sha256 is another one"


def slots_of(artifact: Artifact) -> AdapterSlots:
    """What an artifact takes of an adapter.

    Raises:
        UsageError: nothing.
    """
    slots = artifact.manifest.contract.adapters
    if slots is None:
        raise UsageError(
            "takes no adapter at run time",
            where=str(artifact.path),
            expected="an artifact of backend.type onnxruntime or native whose recipe has `adapters: {rank: N}`",
            next_step="compile it with that section, or merge the adapter into it: "
            "gemma-deploy compile RECIPE -s frontend.adapter=ADAPTER_DIR",
        )
    return slots


def beside_of(artifact: Artifact, adapters: Sequence[AdapterRef]) -> Path | None:
    """Directory of the adapter that is to be computed beside an artifact's weights.

    None where none is given, or where the artifact takes none: then those given are the ones merged into it.

    Raises:
        UsageError: several, or one with a weight; there is no such directory; the artifact takes none and has none
            merged into it.
    """
    if not adapters:
        return None
    if artifact.manifest.contract.adapters is None and artifact.manifest.checkpoint.adapters:
        return None
    slots_of(artifact)
    if len(adapters) > 1 or adapters[0].weight != 1:
        raise UsageError(
            "one adapter at a time is computed beside an artifact, with the weight 1",
            where=str(artifact.path),
            next_step="name one, or merge them: gemma-deploy compile RECIPE --adapter DIR:WEIGHT --adapter DIR:WEIGHT",
        )
    path = reading.expand(adapters[0].path)
    if absent := reading.why_absent(path):
        kept = " (of a kept adapter too: PEFT reads the directory)" if str(path) in kept_names(artifact) else ""
        raise UsageError(
            absent,
            where=str(path),
            expected=f"the directory that peft's save_pretrained wrote{kept}",
            next_step="check the path (--adapter)",
        )
    return path


def file_of(artifact: Artifact) -> str:
    """Name of the file of a kept adapter that the artifact's runtime loads."""
    return FILES.get(artifact.manifest.recipe.backend.type, FILE)


def folder_of(artifact: Artifact, name: str) -> Path:
    """Where an adapter of that name is, or would be.

    Raises:
        UsageError: it is no name.
    """
    if not NAME.fullmatch(name) or is_temporary(Path(name)):
        raise UsageError(
            f"{name[:100]!r} is no name of an adapter",
            expected="letters, digits, dots, dashes and underscores, 100 at most, the first a letter or digit",
            next_step="give another --name",
        )
    return artifact.path / ADAPTERS / name


def kept_names(artifact: Artifact) -> list[str]:
    """Names of the adapters that an artifact holds; what is half written is none."""
    folder = artifact.path / ADAPTERS
    if not reading.is_dir(folder):
        return []
    return sorted(one.name for one in folder.iterdir() if NAME.fullmatch(one.name) and not is_temporary(one))


def open_kept(artifact: Artifact, name: str) -> KeptAdapter:
    """A kept adapter; its file is not read, `KeptAdapter.check` does that.

    Raises:
        UsageError: there is none of that name.
        ArtifactError: its record is damaged, or it was made for another artifact.
    """
    folder, names = artifact.path / ADAPTERS / name, kept_names(artifact)
    if name not in names or not reading.is_dir(folder):
        held = ", ".join(names) or "none"
        raise UsageError(
            f"there is no adapter {name[:100]!r}",
            where=str(artifact.path),
            expected=f"a directory that peft's save_pretrained wrote, or one of those kept here: {held}",
            next_step="check the path, or make it: gemma-deploy adapter ARTIFACT ADAPTER_DIR --name NAME",
        )
    values = reading.read_object(folder / RECORD, RECORD_FILE)
    try:
        record = KeptRecord.model_validate(values)
    except ValidationError as error:
        raise ArtifactError(
            "is damaged",
            where=str(folder / RECORD),
            problems=lines_of(error),
            expected=RECORD_FILE.expected,
            next_step=RECORD_FILE.next_step,
        ) from error
    if record.artifact != artifact.manifest.key:
        raise ArtifactError(
            "this adapter was made for another artifact, or this one was compiled again since",
            where=str(folder),
            next_step=AGAIN.format(name),
        )
    return KeptAdapter(name, folder, record, folder / file_of(artifact))


def kept_files(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """Every file below the folder of adapters that is nothing half written: (name of its adapter, its path there)."""
    root = artifact.path / ADAPTERS
    for name in kept_names(artifact):
        for file in sorted((root / name).rglob("*")):
            if file.is_file():
                yield name, file.relative_to(root / name).as_posix()


def kept_problems(artifact: Artifact) -> list[str]:
    """What is wrong with kept adapters: records, hashes, and files that belong to none."""
    problems = []
    for name in kept_names(artifact):
        try:
            found = open_kept(artifact, name)
        except (ArtifactError, UsageError) as error:
            problems.append(f"{ADAPTERS}/{name}: {error.what}")
            continue
        if problem := found.problem():
            problems.append(f"{ADAPTERS}/{name}/{found.file.name}: {problem}")
    problems += [
        f"{ADAPTERS}/{name}/{file} does not belong to the adapter"
        for name, file in kept_files(artifact)
        if file not in (RECORD, file_of(artifact), MARK)
    ]
    return problems
