"""Checkpoints of a training that was stopped: which are whole, and how many are kept.

The trainer writes a checkpoint file by file into its final place, and deletes older ones before anything is on the
disk. Here a checkpoint counts when it holds a list of its files that was written last; all others are deleted.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from gemma_deploy.errors import DeployError
from gemma_deploy.reading import FileKind, read_object
from gemma_deploy.writing import sync_tree, write_json

WHOLE = "gemma-deploy-whole.json"
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)")
_LIST = FileKind(DeployError, "a list of files", "delete it")


def mark_whole(checkpoint: Path) -> None:
    """Bring a checkpoint to the disk, then say that it is whole.

    Raises:
        OSError: the disk refuses.
    """
    sync_tree(checkpoint)
    files = {file.name: file.stat().st_size for file in sorted(checkpoint.iterdir()) if file.name != WHOLE}
    write_json(checkpoint / WHOLE, files)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of it is there with its size."""
    try:
        files: dict[str, Any] = read_object(checkpoint / WHOLE, _LIST)
    except DeployError:
        return False
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
               for name, size in files.items())  # fmt: skip


def whole_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    found = {int(match[1]): one for one in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(one.name))}
    return [found[step] for step in sorted(found) if is_whole(found[step])]


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint to go on from; those that are not whole are deleted."""
    whole = whole_checkpoints(folder)
    for one in folder.glob("checkpoint-*"):
        if one not in whole:
            shutil.rmtree(one)
    return whole[-1] if whole else None


def delete_old(folder: Path, best: str | None) -> None:
    """Keep the newest ones and the best.

    Args:
        folder: of the checkpoints.
        best: its path, where one is the best.
    """
    for one in whole_checkpoints(folder)[:-KEPT]:
        if best is None or one.name != Path(best).name:
            (one / WHOLE).unlink()  # what is left of it when this is cut short does not count
            shutil.rmtree(one)
