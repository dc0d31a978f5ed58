"""Results kept in the artifact they are about: eval.json, and a section of report.html.

Both are files that the manifest lists with their hashes, as it lists all others, so `verify` goes on knowing every
byte. They are written under temporary names; the manifest is replaced first and says what they become.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_deploy.artifact.manifest import FileFacts, Manifest
from gemma_deploy.artifact.opened import Artifact, refuse_problems
from gemma_deploy.artifact.report import REPORT, report_page
from gemma_deploy.errors import ArtifactError, BusyError, UsageError
from gemma_deploy.evaluation.schema import evaluation_problems
from gemma_deploy.names import MANIFEST
from gemma_deploy.reading import FileKind, read_bytes, read_object
from gemma_deploy.workdir import Lock
from gemma_deploy.writing import PARTIAL, finite, json_text, remove_leftovers, sync, write_bytes, write_json

EVAL = "eval.json"
FORMAT_VERSION = 1
QUESTION = ("task", "settings", "against")  # results that have these in common replace each other
EVAL_FILE = FileKind(
    error=ArtifactError,
    expected="what `gemma-deploy eval` wrote",
    next_step="copy the artifact again, or compile the recipe again with --force",
    finite=True,
    whole_characters=True,
)
HALF = PARTIAL


def refuse_read_only(artifact: Path) -> None:
    """Find out before hours of work that the result cannot be kept.

    Raises:
        UsageError: the artifact may not be written to.
    """
    closed = [str(place) for place in (artifact, artifact.resolve().parent) if not os.access(place, os.W_OK)]
    if closed:
        raise UsageError(
            f"the result cannot be kept in the artifact: {', '.join(closed)} may not be written to",
            where=str(artifact),
            next_step="use --no-record (and --json FILE), or allow writing",
        )


def finish_interrupted(artifact: Path) -> None:
    """Give files their names when an evaluation was killed between writing the manifest and doing so.

    Where another process is at work on the artifact, nothing is done; `record` tells the user.
    """
    if not (artifact / MANIFEST).is_file():
        return
    try:
        lock = Lock(artifact.resolve())
    except BusyError:
        return
    try:
        _finish(artifact)
    finally:
        lock.release()


def _finish(artifact: Path) -> None:
    """`finish_interrupted`, under the lock."""
    remove_leftovers(artifact)
    for name in (EVAL, REPORT):
        half = artifact / (name + HALF)
        if half.is_file():
            facts = Artifact.open(artifact).manifest.files.get(name)
            if facts is not None and facts.sha256 == _sha256(read_bytes(half, EVAL_FILE)):
                half.replace(artifact / name)
            else:  # killed before the manifest knew it
                half.unlink()


def results_of(artifact: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Results recorded so far.

    Raises:
        ArtifactError: eval.json is missing or damaged.
    """
    if EVAL not in manifest.files:
        return []
    content = read_object(artifact / EVAL, EVAL_FILE)
    refuse_problems(artifact / EVAL, evaluation_problems(content))
    results: list[dict[str, Any]] = content["results"]
    return results


def record(artifact: Path, result: Mapping[str, Any]) -> Path:
    """Add a result to eval.json, in the place of an older one to the same question, and rewrite the report.

    Raises:
        ArtifactError: the artifact is damaged. BusyError: another process is at work on it.
    """
    artifact = artifact.resolve()
    lock = Lock(artifact)
    try:
        _finish(artifact)
        manifest = Artifact.open(artifact).manifest
        older = results_of(artifact, manifest)
        kept = [one for one in older if any(one.get(key) != result[key] for key in QUESTION)]
        results = [*kept, finite(dict(result))]
        content = json_text({"format_version": FORMAT_VERSION, "results": results}, sort_keys=False, ensure_ascii=False)
        files = {EVAL: content, REPORT: report_page(manifest, results)}
        known = dict(manifest.files)
        for name, text in files.items():
            raw = text.encode("utf-8", "backslashreplace")
            write_bytes(artifact / (name + HALF), raw)
            known[name] = FileFacts(bytes=len(raw), sha256=_sha256(raw))
        write_json(artifact / MANIFEST, manifest.but(files=known).to_json())
        for name in files:
            (artifact / (name + HALF)).replace(artifact / name)
        sync(artifact)
    finally:
        lock.release()
    return artifact / EVAL


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
