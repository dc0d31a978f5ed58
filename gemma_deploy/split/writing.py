"""A checkpoint cut into directories, one per part, streamed: no part is ever in memory.

OUT/split.json names the parts in order; OUT/PART holds config.json and model.safetensors, OUT itself the tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import UsageError
from gemma_deploy.params.plan import ITEM_BITS, ParamSpec
from gemma_deploy.params.writer import write_params
from gemma_deploy.partition import Span
from gemma_deploy.partition.mapper import ParameterMapper
from gemma_deploy.split.layout import INDEX, WEIGHTS, part_config
from gemma_deploy.staging import write_tokenizer

Progress = Callable[[int, int], None]


def write_split(
    checkpoint: Checkpoint,
    spans: Sequence[Span],
    out: Path,
    *,
    force: bool = False,
    workers: int = 2,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Write every part into OUT.partial, continuing what a killed run left there, and rename it.

    Args:
        progress: called with (bytes written, bytes in all) of all parts.

    Returns:
        split.json's rows: name, start, stop, tensors and bytes of each part.

    Raises:
        UsageError: `out` is there already; ParamsError: a weight is not finite, or the disk is full.
    """
    _refuse_strangers(out, force)
    partial = out.with_name(out.name + ".partial")
    plans = {span: _plan(checkpoint, span) for span in spans}
    sizes = {span: sum(spec.nbytes for spec in plan) for span, plan in plans.items()}
    total = sum(sizes.values())
    rows: list[dict[str, Any]] = []
    for span, plan in plans.items():
        before = sum(row["bytes"] for row in rows)
        folder = partial / span.name
        folder.mkdir(parents=True, exist_ok=True)
        write_params(
            checkpoint,
            plan,
            folder / WEIGHTS,
            journal=folder / "journal",
            workers=workers,
            progress=None if progress is None else _from(progress, before, total),
        )
        _write_json(folder / "config.json", part_config(checkpoint.config, span))
        rows.append(
            {"name": span.name, "start": span.start, "stop": span.stop, "tensors": len(plan), "bytes": sizes[span]}
        )
    write_tokenizer(checkpoint, partial, link=False)
    _write_json(partial / INDEX, {"model_type": checkpoint.config.model_type, "parts": rows})
    names = [row["name"] for row in rows]
    for folder in [entry for entry in partial.iterdir() if entry.is_dir() and entry.name not in names]:
        shutil.rmtree(folder)  # a part of other points, by a killed run
    for row in rows:
        (partial / row["name"] / "journal").unlink()
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return rows


def _from(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def _plan(checkpoint: Checkpoint, span: Span) -> list[ParamSpec]:
    """Every tensor as it is stored; what only GGUF stores becomes float32."""
    plan = []
    for local, source in ParameterMapper(checkpoint.config, span).sources.items():
        info = checkpoint.tensors[source]
        dtype: Any = info.dtype if info.dtype in ITEM_BITS else "float32"
        plan.append(ParamSpec(local, info.shape, dtype, "cast", source))
    return plan


def _refuse_strangers(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not (out / INDEX).is_file():
        raise UsageError(
            "exists and is no split model; it will not be touched", where=str(out), next_step="choose another directory"
        )
    if not force:
        raise UsageError("holds a split model already", where=str(out), next_step="use --force to replace it")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
