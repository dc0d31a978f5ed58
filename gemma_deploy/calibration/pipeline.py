"""Calibration from end to end: data set -> windows -> streaming pass -> result directory; or the result found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy import paths
from gemma_deploy.calibration import picture, store
from gemma_deploy.calibration.room import check_room
from gemma_deploy.calibration.sources import SOURCES
from gemma_deploy.calibration.sources.reading import explained
from gemma_deploy.calibration.store import Calibration, Range
from gemma_deploy.calibration.windows import Windows, cut_windows, load_tokenizer, shuffled
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError, UsageError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What to calibrate on.

    Args:
        dataset: a name of `SOURCES`.
        path: the data set's file; None takes the bundled sample.
        nsamples, seqlen: windows, and tokens in each, BOS included.
        seed: order of the texts.
        embed_scale: "exact" or "bf16", how the model rounds its embedding scale.
    """

    dataset: str
    path: Path | None
    nsamples: int
    seqlen: int
    seed: int = 0
    embed_scale: str = "exact"

    @property
    def file(self) -> Path:
        """The file to read."""
        return self.path if self.path is not None else paths.calib_dir() / SOURCES[self.dataset].bundled


@dataclass(frozen=True)
class Outcome:
    """A calibration, and whether it had been made before."""

    calibration: Calibration
    reused: bool


def calibrate(
    checkpoint: Checkpoint, request: Request, workspace: Path, *, force: bool = False, progress: Progress | None = None
) -> Outcome:
    """Make or find the calibration of these inputs.

    Args:
        checkpoint: the model.
        request: what to calibrate on.
        workspace: the result goes to its calib/.
        force: make it again.
        progress: called with (windows passed through layers, all of them).

    Raises:
        UsageError: a data set that is not known, or windows longer than the model's context.
        CalibrationError: the data set is damaged or too short, or the workspace cannot be written to.
        CheckpointError: no usable tokenizer.
        PreflightError: too little memory or disk.
    """
    check(checkpoint, request)
    inputs = describe_inputs(checkpoint, request)
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    out = store.directory_for(workspace, request.dataset, fingerprint)
    found = None if force else store.find(out, fingerprint)
    if found:
        return Outcome(found, True)
    check_room(checkpoint.config, request.nsamples, request.seqlen, workspace)
    windows = make_windows(checkpoint, request)
    with store.whole_or_nothing(out) as partial:
        ranges = measure(checkpoint, windows, request, partial, progress)
        title = f"{checkpoint.path.name} on {request.dataset}: {request.nsamples} windows of {request.seqlen} tokens"
        picture.draw(ranges, title, partial / store.PICTURE)
        record: dict[str, Any] = {"fingerprint": fingerprint, "inputs": inputs, "texts_used": windows.texts_used}
        record["places"] = {"dataset": str(request.file), "checkpoint": str(checkpoint.path)}
        store.write(partial, record, windows.ids, ranges)
    return Outcome(Calibration.open(out), False)


def check(checkpoint: Checkpoint, request: Request) -> None:
    """What can be refused before anything is read."""
    if request.dataset not in SOURCES:
        raise UsageError(
            f"no data set is called {request.dataset!r}",
            expected="one of " + ", ".join(SOURCES),
            next_step="give the one whose format your file has",
        )
    if request.nsamples < 1 or request.seqlen < 2:
        raise UsageError(
            f"{request.nsamples} windows of {request.seqlen} tokens",
            expected="at least 1 window of 2 tokens, the first of them BOS",
            next_step="raise --nsamples or --seqlen",
        )
    longest = checkpoint.config.max_position_embeddings
    if request.seqlen > longest:
        raise UsageError(
            f"windows of {request.seqlen} tokens are longer than the model's context",
            where=str(checkpoint.path),
            expected=f"at most {longest} (max_position_embeddings)",
            next_step=f"use --seqlen {min(longest, 1024)}",
        )
    if checkpoint.config.bos_token_id is None:
        raise CheckpointError(
            "bos_token_id is null, but every Gemma sequence begins with BOS",
            where=str(checkpoint.path / "config.json"),
            next_step="set bos_token_id in config.json (2 in every Gemma)",
        )


def describe_inputs(checkpoint: Checkpoint, request: Request) -> dict[str, Any]:
    """Everything the result depends on."""
    with explained(request.file, f"a {request.dataset} file"):
        data = store.sha256_of(request.file)
    return {
        "dataset": {"name": request.dataset, "file": request.file.name, "sha256": data},
        "checkpoint": {"fingerprint": checkpoint.fingerprint(), "model_type": checkpoint.config.model_type},
        "windows": {"nsamples": request.nsamples, "seqlen": request.seqlen, "seed": request.seed},
        "embed_scale": request.embed_scale,
        "code": code_version(),
    }


def code_version() -> str:
    """sha256 over the code a result depends on: this package and the patched model."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parent, paths.source_code_dir()):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def make_windows(checkpoint: Checkpoint, request: Request) -> Windows:
    """Read, shuffle, tokenize and cut."""
    tokenizer = load_tokenizer(checkpoint)
    assert checkpoint.config.bos_token_id is not None  # see check()
    return cut_windows(
        shuffled(lambda: SOURCES[request.dataset].texts(request.file), request.seed),
        tokenizer,
        bos_id=checkpoint.config.bos_token_id,
        vocab_size=checkpoint.config.vocab_size,
        nsamples=request.nsamples,
        seqlen=request.seqlen,
        where=str(request.file),
    )


def measure(
    checkpoint: Checkpoint, windows: Windows, request: Request, scratch: Path, progress: Progress | None
) -> dict[str, Range]:
    """Ranges of every point over all windows."""
    from gemma_deploy.calibration.driver import run_layers
    from gemma_deploy.calibration.observers import RangeObserver

    observers: dict[str, RangeObserver] = {}
    run_layers(
        checkpoint,
        windows.ids,
        lambda point, x: observers.setdefault(point, RangeObserver()).update(x),
        scratch=scratch,
        embed_scale=request.embed_scale,
        progress=progress,
    )
    return {
        point: Range(np.asarray(seen.minimum.numpy()), np.asarray(seen.maximum.numpy()))
        for point, seen in observers.items()
    }
