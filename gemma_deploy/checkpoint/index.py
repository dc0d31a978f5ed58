"""Which files of a directory hold the weights: one model.safetensors, or an index that names shards.

Says in plain words what else was found (pickles, an adapter, a lone shard) instead of "not found".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_deploy import reading
from gemma_deploy.checkpoint.safetensors_reader import SafetensorsFile
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import MANIFEST

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
JSON_LIMIT_BYTES = 64 << 20
AGAIN = "repair it, or copy it again from where the weights came from"
JSON_FILE = reading.FileKind(
    error=CheckpointError,
    expected="a UTF-8 file that holds one JSON object {...}",
    next_step=AGAIN,
    unreadable="make it a file that you may read, or copy it again from where the weights came from",
    limit_bytes=JSON_LIMIT_BYTES,
    unique_keys=True,
)


@dataclass(frozen=True)
class Shards:
    """Weight files in order of name, and the index's tensor -> file map when there is one."""

    files: tuple[Path, ...]
    index: dict[str, str] | None


def read_json(path: Path, *, missing: str = AGAIN) -> tuple[dict[str, Any], bytes]:
    """A JSON object and its bytes.

    Args:
        path: the file.
        missing: the next step to name when it is not there.
    """
    kind = replace(JSON_FILE, missing=missing)
    data = reading.read_bytes(path, kind)
    return reading.object_in(data, path, kind), data


def locate_shards(directory: Path) -> Shards:
    """The weight files of a checkpoint directory; the index's names are checked before they are used."""
    if reading.is_file(directory / SINGLE_NAME):
        return Shards((directory / SINGLE_NAME,), None)
    index_path = directory / INDEX_NAME
    if not reading.is_file(index_path):
        try:
            found = sorted(directory.iterdir())
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}",
                where=str(directory),
                next_step="allow reading it, or pass another checkpoint",
            ) from error
        refuse_other_formats(directory, found)
    index, _ = read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or any(type(v) is not str for v in weight_map.values()):
        raise CheckpointError(
            "weight_map is missing or does not map tensor names to file names",
            where=str(index_path),
            next_step="copy the index again from where the weights came from",
        )
    names = sorted(set(weight_map.values()))
    unsafe = [name for name in names if not _is_inside(directory, name)]
    if unsafe:
        raise CheckpointError(
            f"names {len(unsafe)} file(s) outside its own directory; nothing was opened",
            where=str(index_path),
            problems=[repr(name)[:200] for name in unsafe],
            expected="files beside the index or in folders there (no '..', no absolute path, no link leading outside)",
            next_step="do not use this checkpoint unless you know who made it",
        )
    missing = [name for name in names if not reading.is_file(directory / name)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are not there",
            where=str(index_path),
            problems=[f"{name[:80]}..." if len(name) > 200 else name for name in missing],
            next_step=f"download them into {directory}",
        )
    return Shards(tuple(directory / name for name in names), weight_map)


def read_shards(directory: Path, shards: Shards) -> dict[str, SafetensorsFile]:
    """Tensor name -> the open file that holds it; every disagreement with the index at once."""
    files: dict[str, SafetensorsFile] = {}
    problems: list[str] = []
    for path in shards.files:
        file = SafetensorsFile(path)
        local = path.relative_to(directory).as_posix()
        for name in file.entries:
            if name in files:
                other = files[name].path.relative_to(directory).as_posix()
                problems.append(f"{name} is in both {other} and {local}")
            elif shards.index is not None and shards.index.get(name, local) != local:
                problems.append(f"{name} is in {local}, the index says {shards.index[name]}")
            files[name] = file
    problems += [f"{name} is not in {shard}" for name, shard in (shards.index or {}).items() if name not in files]
    if problems:
        raise CheckpointError(
            "the index and the shards disagree",
            where=str(directory / INDEX_NAME),
            problems=problems,
            next_step="download the index and the shards again, from one place",
        )
    return files


def refuse_other_formats(directory: Path, found: Sequence[Path]) -> None:
    """Always raises: names what is there instead of safetensors, and the way on."""
    names = [path.name for path in found]
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    shards = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    expected = f"{SINGLE_NAME}, or {INDEX_NAME} with its shards, or the path of a .gguf file"
    if {"adapter_model.safetensors", "adapter_config.json"} & set(names):
        what = "this is a LoRA adapter, not a model"
        step = "name its base model as the checkpoint, and this directory with --adapter (or run: gemma-deploy merge)"
    elif MANIFEST in names:
        what = "this is an artifact, not a checkpoint"
        step = f"pass the checkpoint that it was made from; `gemma-deploy inspect {directory}` says which"
    elif pickles:
        what = f"only pickled weights ({', '.join(pickles[:3])}); they can run code when loaded and are never opened"
        step = "convert them to safetensors: load them in transformers where you trust them, then save_pretrained(DIR)"
    elif shards:
        what = f"{shards[0]} alone: {INDEX_NAME} is missing" if len(names) > 1 else f"{shards[0]} is one weight file"
        step = f"pass the directory; it must hold config.json and {SINGLE_NAME} or the index"
    elif ggufs:
        what, step = f"no safetensors, but {ggufs[0]}", f"pass the file itself: {directory / ggufs[0]}"
    else:
        what, step = "no weights here", "pass the directory that holds config.json and the *.safetensors files"
    where = str(found[0]) if len(found) == 1 and found[0].is_file() else str(directory)
    raise CheckpointError(what, where=where, expected=expected, next_step=step)


def _is_inside(directory: Path, name: str) -> bool:
    """Whether an index may name this file: beside it, or in a folder there that is no way out.

    A file beside the index may be a link, as in the Hugging Face cache, where `snapshots/REVISION` links to `blobs`.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return False
    if any(bad in name for bad in ("\\", "\0", ":")):
        return False
    if len(parts) == 1:
        return True
    root, file = (Path(os.path.realpath(path)) for path in (directory, directory / name))
    folder = Path(os.path.realpath((directory / name).parent))
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return folder.is_relative_to(root) and any(file.is_relative_to(place) for place in allowed)
