"""`finetune`: everything that can be wrong before the model is loaded, then the training, then what it leaves in OUT.

OUT is whole or not there (workdir.py). A run that was killed goes on from its newest whole checkpoint when the same
command is given again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_deploy import extras
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import DeployError, PreflightError, UsageError
from gemma_deploy.finetune import launching
from gemma_deploy.finetune.arguments import sft_config
from gemma_deploy.finetune.disk import Room, check_disk, saving_of
from gemma_deploy.finetune.encoding import Examples
from gemma_deploy.finetune.plan import Memory, check_memory, shape_of
from gemma_deploy.finetune.preparing import Prepared, prepare
from gemma_deploy.finetune.report import page, record
from gemma_deploy.finetune.result import FinetuneResult
from gemma_deploy.finetune.settings import FinetuneSettings
from gemma_deploy.finetune.training import BEFORE, CHECKPOINTS, Outcome, train
from gemma_deploy.machine import Machine
from gemma_deploy.progress import Tick
from gemma_deploy.provenance import version_of
from gemma_deploy.reading import FileKind, read_object
from gemma_deploy.workdir import Maker, WorkDir, refuse_directory
from gemma_deploy.writing import finite, write_json

REQUEST, RUN, REPORT = "request.json", "run.json", "report.html"
FINETUNE = Maker("finetune", DeployError, full="make room there and run the same command again: it goes on")
_REQUEST = FileKind(DeployError, "the settings of an unfinished fine-tuning", "delete its directory")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
log = logging.getLogger(__name__)


def finetune(
    settings: FinetuneSettings,
    checkpoint: str | Path,
    *,
    recipe: str = "RECIPE",
    dry_run: bool = False,
    machine: Machine | None = None,
    progress: Tick | None = None,
) -> FinetuneResult:
    """Train an adapter, or a whole model, on a file of examples.

    Args:
        settings: what is asked for; `data` and `out` have to be set.
        checkpoint: the base: a directory, a .gguf file, or "demo".
        recipe: what the command that compiles the result is to name.
        dry_run: check everything, estimate the memory, and stop.
        machine: what this machine has; measured when None.
        progress: is called with steps done and all.

    Raises:
        UsageError: something that is asked for makes no sense, OUT is finished, or began with other settings.
        CheckpointError: the base is damaged. PreflightError: there is too little memory or disk.
        DeployError: the training failed.
    """
    data, out = _needed(settings)
    extras.require("build", "finetune", what="`gemma-deploy finetune`")
    if settings.method == "qlora":
        extras.require("bitsandbytes", what="`gemma-deploy finetune --method qlora`")
    refuse_directory(out, "--out (finetune.out)")
    opened = Checkpoint.open(checkpoint)
    prepared = prepare(settings, opened, data)
    settings = prepared.settings
    arguments = sft_config(settings, str(out), held_out=prepared.held_out is not None)
    memory, room = _room_for(settings, prepared, arguments, out, machine or Machine.measure(out))
    full = settings.method == "full"
    result = FinetuneResult(
        path=out,
        adapter=None if full else out / "adapter",
        model=out / "model" if full else None,
        base=settings.base,
        outcome=None,
        memory=memory,
        room=room,
        examples=prepared.train,
        held_out=prepared.held_out,
    )
    if dry_run:
        return result
    request = request_of(prepared)
    with _Work(out, request) as work:
        outcome = None
        if not work.finished:
            outcome = run_in(work.path, prepared, progress)
            _describe(work.path, result, outcome, request=request, recipe=recipe)
            work.publish()
    return replace(result, outcome=outcome)


def _room_for(
    settings: FinetuneSettings, prepared: Prepared, arguments: Any, out: Path, machine: Machine
) -> tuple[Memory, Room]:
    """Memory and disk that are needed; one error where both are short."""
    checkpoint, rows = prepared.checkpoint, prepared.train.rows
    shape = shape_of(settings, arguments, max(len(row.ids) for row in rows))
    saving = saving_of(settings, arguments, examples=len(rows))
    try:
        memory = check_memory(settings, checkpoint, shape, machine=machine)
    except PreflightError as short:
        try:
            check_disk(settings, checkpoint, saving, out=out, machine=machine)
        except PreflightError as also:
            problems = [f"{one.what}; {one.next_step}" for one in (short, also)]
            raise PreflightError(
                "memory and disk are too small for the training",
                where=f"finetune, {out}",
                problems=problems,
                next_step="change the settings that are named, or take another machine",
            ) from None
        raise
    return memory, check_disk(settings, checkpoint, saving, out=out, machine=machine)


def run_in(folder: Path, prepared: Prepared, progress: Tick | None) -> Outcome:
    """Train, in this process or in several."""
    if launching.is_distributed(prepared.settings):
        return launching.launch(prepared, folder)
    outcome = train(prepared, folder, progress)
    assert outcome is not None
    return outcome


def _needed(settings: FinetuneSettings) -> tuple[str, Path]:
    missing = [option for option, value in (("data", settings.data), ("out", settings.out)) if value is None]
    if missing:
        raise UsageError(
            f"nothing says {' and '.join(missing)}",
            where="finetune",
            expected="--data FILE --out DIR, or the keys of the recipe's section finetune",
            next_step="name " + " and ".join(f"--{name}" for name in missing),
        )
    assert settings.data is not None
    assert settings.out is not None
    return settings.data, Path(settings.out)


def request_of(prepared: Prepared) -> dict[str, Any]:
    """Everything that a result depends on, as plain values."""
    settings = prepared.settings.model_dump(mode="json")
    settings.pop("out")

    def digest(examples: Examples | None) -> str | None:
        if examples is None:
            return None
        made = hashlib.sha256()
        for row in examples.rows:
            made.update(row.ids.tobytes() + b"\0" + row.labels.tobytes() + b"\0")
        return made.hexdigest()

    return {
        "settings": settings,
        "checkpoint": prepared.checkpoint.fingerprint(),
        "examples": digest(prepared.train),
        "held_out": digest(prepared.held_out),
        "libraries": {name: version_of(name) for name in LIBRARIES},
    }


class _Work(WorkDir):
    """OUT, which is never replaced; an unfinished one goes on with the same request alone."""

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        self.request = request
        text = json.dumps(request, sort_keys=True)
        super().__init__(out, FINETUNE, key=hashlib.sha256(text.encode()).hexdigest())

    def check(self) -> None:
        """Refuse a finished OUT, and one that was begun with another request."""
        if self.out.exists() or self.out.is_symlink():
            raise UsageError(
                "is finished already" if (self.out / RUN).is_file() else "exists already",
                where=str(self.out),
                next_step="name another directory with --out, or delete this one",
            )
        began = self.path / REQUEST
        if not began.is_file():
            return
        other = differences(read_object(began, _REQUEST), self.request)
        if other:
            raise UsageError(
                "an unfinished run with other settings is in the way",
                where=str(self.path),
                problems=other,
                expected="the settings it was begun with, with which it goes on",
                next_step="give these, name another --out, or delete that directory",
            )

    def begin(self) -> None:
        """Write down what is asked for."""
        write_json(self.path / REQUEST, self.request)

    def tidy(self) -> None:
        """Checkpoints of the trainer, and what only they need."""
        for name in (CHECKPOINTS, "staged"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (REQUEST, BEFORE, "work.json", "outcome.json", "failure.json"):
            (self.path / name).unlink(missing_ok=True)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> list[str]:
    """What of two requests differs, a line for each key."""
    found = []
    for key in sorted({*before, *now}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{above}{key}.")
        elif one != other:
            short = [str(value)[:40] for value in (one, other)]
            found.append(f"{above}{key}: it was begun with {short[0]}, now it is {short[1]}".removeprefix("settings."))
    return found


def _describe(
    folder: Path, result: FinetuneResult, outcome: Outcome, *, request: Mapping[str, Any], recipe: str
) -> None:
    """run.json and report.html."""
    said = record(result, outcome, request=request, recipe=recipe)
    write_json(folder / RUN, finite(said))
    (folder / REPORT).write_text(page(said), encoding="utf-8")
