"""A checkpoint cut into directories, one per part, streamed: no part is ever in memory.

OUT/split.json names the parts in order; OUT/PART holds config.json and model.safetensors, OUT itself the tokenizer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.dtypes import StoredDtype
from gemma_deploy.errors import ParamsError, UsageError
from gemma_deploy.names import CONFIG
from gemma_deploy.params.plan import ParamSpec
from gemma_deploy.params.writer import write_params
from gemma_deploy.partition import Span
from gemma_deploy.partition.mapper import ParameterMapper
from gemma_deploy.progress import Tick
from gemma_deploy.split.layout import INDEX, WEIGHTS, part_config
from gemma_deploy.text import check_text, with_stops
from gemma_deploy.text.saving import write_tokenizer
from gemma_deploy.workdir import Maker, WorkDir
from gemma_deploy.writing import finite, write_json

JOURNAL = "journal"
SPLIT = Maker("split", ParamsError, full="make room there and run the same command again: it continues")


def write_split(
    checkpoint: Checkpoint,
    spans: Sequence[Span],
    out: Path,
    *,
    force: bool = False,
    workers: int = 2,
    progress: Tick | None = None,
) -> list[dict[str, Any]]:
    """Write every part into OUT.partial, continuing what a killed run of the same parts left there, and rename it.

    Args:
        progress: called with (bytes written, bytes in all) of all parts.

    Returns:
        split.json's rows: name, start, stop, tensors and bytes of each part.

    Raises:
        UsageError: `out` is there already. BusyError: another run is writing it.
        ParamsError: a weight is not finite, or the disk is full.
    """
    checkpoint = with_stops(checkpoint, check_text(checkpoint))
    key = hashlib.sha256(repr((checkpoint.fingerprint(), list(spans))).encode()).hexdigest()
    with _Split(out, key, force) as split:
        rows = _write_parts(checkpoint, spans, split.path, workers, progress)
        split.publish()
    return rows


def _write_parts(
    checkpoint: Checkpoint, spans: Sequence[Span], folder: Path, workers: int, progress: Tick | None
) -> list[dict[str, Any]]:
    """Every part in a folder of its own, the tokenizer and the index beside them; the rows of the index."""
    plans = {span: _plan(checkpoint, span) for span in spans}
    sizes = {span: sum(spec.nbytes for spec in plan) for span, plan in plans.items()}
    total = sum(sizes.values())
    rows: list[dict[str, Any]] = []
    for span, plan in plans.items():
        before = sum(row["bytes"] for row in rows)
        place = folder / span.name
        place.mkdir(exist_ok=True)
        write_params(
            checkpoint,
            plan,
            place / WEIGHTS,
            journal=place / JOURNAL,
            workers=workers,
            progress=None if progress is None else _from(progress, before, total),
        )
        write_json(place / CONFIG, finite(part_config(checkpoint.config, span)), indent=2, sort_keys=False)
        rows.append(
            {"name": span.name, "start": span.start, "stop": span.stop, "tensors": len(plan), "bytes": sizes[span]}
        )
    write_tokenizer(checkpoint, folder, link=False)
    index = {"model_type": checkpoint.config.model_type, "parts": rows}
    write_json(folder / INDEX, index, indent=2, sort_keys=False)
    return rows


class _Split(WorkDir):
    """OUT, which only replaces a split model, and nothing without force."""

    def __init__(self, out: Path, key: str, force: bool) -> None:
        super().__init__(out, SPLIT, key=key)
        self.force = force

    def check(self) -> None:
        """Refuse what must not be replaced."""
        if not os.path.lexists(self.out):
            return
        if not (self.out / INDEX).is_file():
            raise UsageError(
                "exists and is no split model; it will not be touched",
                where=str(self.out),
                next_step="choose another directory",
            )
        if not self.force:
            raise UsageError("holds a split model already", where=str(self.out), next_step="use --force to replace it")

    def tidy(self) -> None:
        """Remove the journals."""
        for journal in self.path.glob(f"*/{JOURNAL}"):
            journal.unlink()

    def is_whole(self) -> bool:
        """No: `key` does not cover the tokenizer's files. What is written already is found by the journals."""
        return False


def _from(progress: Tick, before: int, total: int) -> Tick:
    return lambda done, _: progress(before + done, total)


def _plan(checkpoint: Checkpoint, span: Span) -> list[ParamSpec]:
    """Every tensor as it is stored; what only GGUF stores becomes float32, what adapters changed as its neighbours."""
    plan = []
    mapper = ParameterMapper(checkpoint.config, span)
    for local, source in mapper.sources.items():
        info = checkpoint.tensors[source]
        stored = checkpoint.own_dtype if checkpoint.is_changed(source) else info.dtype
        dtype: Any = stored if stored in get_args(StoredDtype) else "float32"
        edges = None if (share := mapper.shares.get(source)) is None else (share.start, share.stop)
        rows, columns = ((edges,), None) if edges and share and share.axis == 0 else ((), edges)
        plan.append(ParamSpec(local, mapper.shapes[source], dtype, "cast", source, rows=rows, columns=columns))
    return plan
