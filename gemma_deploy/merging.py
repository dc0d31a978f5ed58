"""A checkpoint with adapters added, as a checkpoint of its own: streamed, so that no model is ever in memory.

What is written is what transformers writes: model.safetensors, or shards and their index, config, generation config and
tokenizer. Each number is computed in float32 and rounded once, to the dtype of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_deploy.checkpoint import AdapterRef, Checkpoint, expected_tensors
from gemma_deploy.checkpoint.index import INDEX_NAME, SINGLE_NAME, read_json
from gemma_deploy.dtypes import BY_NAME, StoredDtype
from gemma_deploy.errors import ParamsError, PreflightError, UsageError
from gemma_deploy.machine import nearest_existing, size
from gemma_deploy.names import CONFIG, GENERATION_CONFIG
from gemma_deploy.params.plan import ParamSpec
from gemma_deploy.params.writer import write_params
from gemma_deploy.progress import Tick
from gemma_deploy.text import TextCheck, check_text, with_stops
from gemma_deploy.text.saving import write_tokenizer
from gemma_deploy.workdir import Maker, WorkDir, partial_of
from gemma_deploy.writing import finite, whole_file, write_json

SHARD_BYTES = 5_000_000_000
LEFT_BYTES = 64 << 20  # of the disk
DTYPES: dict[str, StoredDtype] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MERGE = Maker("merge", ParamsError, full="make room there and run the same command again: it continues")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergedCheckpoint:
    """What was written.

    Args:
        path: its directory.
        dtype: of the weights; shards: files; nbytes: of all weights.
        notes: what a user should know about checkpoint and adapters.
    """

    path: Path
    dtype: str
    shards: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]


def merge(
    checkpoint: str | Path,
    adapter: str | Path | AdapterRef | Sequence[AdapterRef],
    out: str | Path,
    *,
    dtype: str | None = None,
    workers: int = 2,
    shard_bytes: int = SHARD_BYTES,
    progress: Tick | None = None,
) -> MergedCheckpoint:
    """Write a checkpoint with adapters added; OUT is there whole or not at all, and a killed run is continued.

    Args:
        checkpoint: a directory, a .gguf file or `demo`.
        adapter: a directory that peft wrote, or several, each with a weight.
        out: the directory to make.
        dtype: "bf16", "fp16" or "fp32"; None for what the checkpoint stores.
        workers: tensors written at a time.
        shard_bytes: the most that a weight file holds, unless one tensor is larger.
        progress: called with (bytes written, bytes in all).

    Raises:
        UsageError: OUT exists, or another dtype. CheckpointError: the checkpoint or an adapter cannot be taken.
        PreflightError: the disk has no room. BusyError: another run is writing OUT.
        ParamsError: a merged value is no number or does not fit the dtype, or the disk refuses.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(
            f"there is no dtype {dtype!r} to merge into", expected=" or ".join(DTYPES), next_step="name one of them"
        )
    out = Path(out)
    _refuse_existing(out)
    opened = Checkpoint.open(checkpoint, adapter)
    text = _text_of(opened)
    stored = DTYPES[dtype] if dtype else _own_dtype(opened)
    shards = _shards(opened, stored, shard_bytes)
    total = sum(spec.nbytes for plan in shards.values() for spec in plan)
    _refuse_small_disk(out, total)
    key = hashlib.sha256(json.dumps([opened.fingerprint(), stored, shard_bytes]).encode()).hexdigest()
    with _Merged(out, key) as merged:
        done = 0
        for name, plan in shards.items():
            with _disk_errors(merged.path / name):
                write_params(
                    opened,
                    plan,
                    merged.path / name,
                    journal=merged.path / f"{name}.journal",
                    workers=workers,
                    progress=None if progress is None else _from(progress, done, total),
                )
            done += sum(spec.nbytes for spec in plan)
        _write_beside(with_stops(opened, text), merged.path, stored, shards)
        merged.publish()
    notes = tuple(dict.fromkeys((*opened.notes, *text.notes)))
    return MergedCheckpoint(merged.out, stored, tuple(shards), total, notes)


def _own_dtype(checkpoint: Checkpoint) -> StoredDtype:
    """What a checkpoint stores; float32 where that is no float type of these."""
    return next((one for one in DTYPES.values() if one == checkpoint.own_dtype), "float32")


def _text_of(checkpoint: Checkpoint) -> TextCheck:
    """Build the tokenizer only where what is written, or whether, depends on it: with a large one that takes a second.

    A .gguf file states too few stop tokens, and an adapter's own tokenizer may have tokens that the model lacks.
    """
    own = checkpoint.tokenizer_dir()
    if checkpoint.format == "gguf" or any(one.adapter.path == own for one in checkpoint.adapters):
        return check_text(checkpoint)
    return TextCheck(checkpoint.config.eos_token_ids)


@contextlib.contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    """Say what a user of `merge` can do where the disk refuses: the writer of parameters speaks of workspaces."""
    try:
        yield
    except ParamsError as error:
        if isinstance(error.__cause__, OSError):
            raise MERGE.disk_error(error.__cause__, file) from error.__cause__
        raise


def _shards(checkpoint: Checkpoint, dtype: StoredDtype, shard_bytes: int) -> dict[str, list[ParamSpec]]:
    """File name -> tensors, in the model's order; the names are those of transformers."""
    plans: list[list[ParamSpec]] = [[]]
    held = 0
    shapes = expected_tensors(checkpoint.config)  # of experts three dimensions, which are read as two
    for name in checkpoint.tensors:
        spec = ParamSpec(name, shapes[name], dtype, "cast", name)
        if plans[-1] and held + spec.nbytes > shard_bytes:
            plans.append([])
            held = 0
        plans[-1].append(spec)
        held += spec.nbytes
    if len(plans) == 1:
        return {SINGLE_NAME: plans[0]}
    stem, suffix = SINGLE_NAME.rsplit(".", 1)
    return {f"{stem}-{at:05d}-of-{len(plans):05d}.{suffix}": plan for at, plan in enumerate(plans, 1)}


def _write_beside(checkpoint: Checkpoint, out: Path, dtype: str, shards: dict[str, list[ParamSpec]]) -> None:
    """Index, config, generation config and tokenizer."""
    if len(shards) > 1:
        count = sum(math.prod(spec.shape) for plan in shards.values() for spec in plan)
        metadata = {"total_parameters": count, "total_size": count * BY_NAME[dtype].itemsize}
        weight_map = {spec.name: name for name, plan in shards.items() for spec in plan}
        write_json(out / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    config = {key: value for key, value in checkpoint.config_dict().items() if key != "torch_dtype"}
    write_json(out / CONFIG, finite(config | {"dtype": dtype}), indent=2, sort_keys=False, ensure_ascii=False)
    source = checkpoint.path / GENERATION_CONFIG
    if checkpoint.format == "gguf":
        write_json(out / GENERATION_CONFIG, checkpoint.config.generation_ids())
    elif source.is_file():
        read_json(source)  # says in a sentence what is wrong with it
        with whole_file(out / GENERATION_CONFIG) as partial:
            shutil.copyfile(source, partial)
    write_tokenizer(checkpoint, out, link=False)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UsageError("exists already", where=str(out), next_step="name another directory, or remove it")


def _refuse_small_disk(out: Path, total: int) -> None:
    """Refuse before any work what the disk has no room for; what a killed run wrote counts as room."""
    partial = partial_of(out)
    held = sum(file.stat().st_size for file in partial.glob("*.safetensors*") if file.is_file())
    free = shutil.disk_usage(nearest_existing(out)).free
    if free + held < total + LEFT_BYTES:
        raise PreflightError(
            f"{size(total)} of weights do not fit on the disk, which has {size(free)} free",
            where=str(out),
            next_step="free space there, or name a directory on another disk",
        )


class _Merged(WorkDir):
    """OUT, which replaces nothing."""

    def __init__(self, out: Path, key: str) -> None:
        super().__init__(out, MERGE, key=key)

    def check(self) -> None:
        """Refuse what is there."""
        _refuse_existing(self.out)

    def tidy(self) -> None:
        """Remove the journals."""
        for journal in self.path.glob("*.journal"):
            journal.unlink()

    def is_whole(self) -> bool:
        """No: `key` does not cover the tokenizer's files. What is written already is found by the journals."""
        return False


def _from(progress: Tick, before: int, total: int) -> Tick:
    return lambda done, _: progress(before + done, total)
