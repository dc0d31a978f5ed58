"""Training in several processes: torch's launcher, or accelerate's with a configuration file, starts `worker`.

The parent has checked everything and holds the lock of OUT; processes read the same examples again, and the first one
writes what came of it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from gemma_deploy import child
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.finetune.checkpoints import newest_whole
from gemma_deploy.finetune.preparing import Prepared, prepare
from gemma_deploy.finetune.settings import FinetuneSettings
from gemma_deploy.finetune.training import CHECKPOINTS, Outcome, Sample, train
from gemma_deploy.reading import FileKind, is_file, read_object
from gemma_deploy.writing import finite, write_json

WORK, OUTCOME, FAILURE = "work.json", "outcome.json", "failure.json"
MODULE = "gemma_deploy.finetune.launching"
_FILE = FileKind(DeployError, "what a process of the training wrote", "run the same command again")


def is_distributed(settings: FinetuneSettings) -> bool:
    """Whether processes of their own train."""
    return settings.accelerate_config is not None or (settings.devices or 1) > 1


def launch(prepared: Prepared, folder: Path) -> Outcome:
    """Train in processes of their own.

    Args:
        prepared: as for `train`.
        folder: where checkpoints and the result go.

    Raises:
        UsageError: there is no such configuration file.
        DeployError: one of them failed.
    """
    settings = prepared.settings
    if settings.accelerate_config is not None and not is_file(settings.accelerate_config):
        raise UsageError(
            "there is no such file",
            where=settings.accelerate_config,
            expected="a file that `accelerate config` wrote",
            next_step="check --accelerate-config (finetune.accelerate_config)",
        )
    newest_whole(folder / CHECKPOINTS)  # here alone: what is not whole is deleted by nobody else
    for name in (OUTCOME, FAILURE):
        (folder / name).unlink(missing_ok=True)
    work = {"settings": settings.model_dump(mode="json"), "checkpoint": str(prepared.checkpoint.path)}
    write_json(folder / WORK, work)
    done = child.run(*_words(settings), "-m", MODULE, str(folder / WORK), variables=_environment(settings))
    if is_file(folder / FAILURE):
        failure = read_object(folder / FAILURE, _FILE)
        raise DeployError(failure["what"], where=failure["where"], next_step=failure["next_step"])
    if done.returncode or not is_file(folder / OUTCOME):
        raise DeployError(
            f"a process of the training ended with exit code {done.returncode}",
            where="finetune",
            next_step="see what it said above; run the same command again to go on from the newest checkpoint",
        )
    said = read_object(folder / OUTCOME, _FILE)
    for name in (WORK, OUTCOME):
        (folder / name).unlink()
    return Outcome(**{**said, "samples": tuple(Sample(**one) for one in said["samples"])})


def _words(settings: FinetuneSettings) -> list[str]:
    """The launcher's command line."""
    count = [] if settings.devices is None else [str(settings.devices)]
    if settings.accelerate_config is not None:
        words = ["-m", "accelerate.commands.launch", "--config_file", settings.accelerate_config]
        return [*words, *(["--num_processes", *count] if count else [])]
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", *count]


def _environment(settings: FinetuneSettings) -> dict[str, str]:
    import torch

    on_cpu = not torch.cuda.is_available() or bool(settings.sft.get("use_cpu"))
    return {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}


def work(file: Path) -> None:
    """In each process: read what is wanted, train, and let the first process write what came of it."""
    asked: dict[str, Any] = read_object(file, _FILE)
    settings = FinetuneSettings.model_validate(asked["settings"])
    try:
        prepared = prepare(settings, Checkpoint.open(asked["checkpoint"]), str(settings.data))
        outcome = train(prepared, file.parent)
    except DeployError as error:
        write_json(file.parent / FAILURE, {"what": error.what, "where": error.where, "next_step": error.next_step})
        sys.exit(error.exit_code)
    if outcome is not None:
        write_json(file.parent / OUTCOME, finite(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
