"""A directory transformers can load as remote code: links to the weights, our modeling files, the checkpoint's config.

Third step of the data path (docs/design.md 2). The checkpoint's own config.json is kept; only `auto_map` and the
patch's switches are added (the generation's row says which). Weights are never copied, except out of a GGUF file,
where they are codes, and out of a model that reads images as well, whose names no text class knows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_deploy import paths
from gemma_deploy.checkpoint.adapters.merging import AdapterRef
from gemma_deploy.checkpoint.checkpoint import Checkpoint
from gemma_deploy.checkpoint.expected import expected_tensors
from gemma_deploy.checkpoint.index import INDEX_NAME, SINGLE_NAME, read_json
from gemma_deploy.checkpoint.source import WeightSource
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.errors import CheckpointError, UsageError
from gemma_deploy.names import CONFIG, GENERATION_CONFIG
from gemma_deploy.progress import Tick
from gemma_deploy.text import check_text, with_stops
from gemma_deploy.text.saving import link_file, write_tokenizer
from gemma_deploy.workdir import Maker, WorkDir
from gemma_deploy.writing import finite, write_json

BLOCK_BYTES = 32 << 20
STAGE = Maker("stage", CheckpointError)


def stage_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | AdapterRef | Sequence[AdapterRef] | None = None,
    force: bool = False,
    source_code: Path | None = None,
    weights: bool = True,
    progress: Tick | None = None,
) -> Path:
    """Make the staged directory, complete or not at all.

    Args:
        path: directory, .gguf file, or `demo`.
        out: the directory to make; it is written as OUT.partial and renamed.
        adapter: added to the weights, see `Checkpoint.open`; they are then written as float32 instead of linked.
        force: replace an OUT that an earlier `stage` made.
        source_code: the modeling files; by default the program's own.
        weights: without them config, tokenizer and modeling files are there alone.
        progress: called with (bytes written, bytes in all) of weights that are written: a .gguf file's, those of a
            multimodal model, and those an adapter is added to.

    Raises:
        UsageError: OUT exists.
        CheckpointError: the checkpoint is unusable, or OUT cannot be written. BusyError: another run is writing it.
    """
    checkpoint = Checkpoint.open(path, adapter)
    if checkpoint.format == "gguf":  # its generation_config.json is ours
        checkpoint = with_stops(checkpoint, check_text(checkpoint))
    source = source_code or paths.source_code_dir()
    additions = _additions(checkpoint, source)
    with _Staged(checkpoint, Path(out), force) as staged:
        partial = staged.path
        for file in sorted(source.glob("*.py")):
            shutil.copyfile(file, partial / file.name)
        config = checkpoint.config_dict()
        dequantized = checkpoint.is_dequantized or bool(checkpoint.adapters)
        if dequantized:
            config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": "float32"}
        if weights and (dequantized or checkpoint.is_nested):
            _write_weights(checkpoint, partial / SINGLE_NAME, progress, as_stored=not dequantized)
        elif weights:
            _link_weights(checkpoint, partial)
        if checkpoint.format == "gguf":
            _write_json(partial / GENERATION_CONFIG, checkpoint.config.generation_ids())
        elif (checkpoint.path / GENERATION_CONFIG).is_file():
            link_file(checkpoint.path / GENERATION_CONFIG, partial / GENERATION_CONFIG)
        write_tokenizer(checkpoint, partial)
        _write_json(partial / CONFIG, config | additions)
        staged.publish()
    return staged.out


def _additions(checkpoint: Checkpoint, source: Path) -> dict[str, Any]:
    """The keys added to config.json for this model type."""
    patched = checkpoint.config.architecture.patched
    absent = [name for name in (patched.configuration, patched.modeling) if not (source / f"{name}.py").is_file()]
    if absent:
        raise CheckpointError(
            "modeling files are not there",
            where=str(source),
            problems=[f"{name}.py" for name in absent],
            next_step="reinstall gemma-deploy",
        )
    return patched.additions


class _Staged(WorkDir):
    """OUT, which only replaces what `stage` made, and nothing without force."""

    def __init__(self, checkpoint: Checkpoint, out: Path, force: bool) -> None:
        super().__init__(out, STAGE)
        self.checkpoint, self.force = checkpoint, force

    def check(self) -> None:
        """Refuse to overwrite, and with force to delete anything that `stage` did not make."""
        if not os.path.lexists(self.out):
            return
        if not self.force:
            raise UsageError("exists already", where=str(self.out), next_step="name another directory, or use --force")
        checkpoint, out = self.checkpoint, self.out.resolve()
        read = [checkpoint.path, checkpoint.tokenizer_dir(), *(one.adapter.path for one in checkpoint.adapters)]
        inside = any(out == place or out in place.parents for place in (path.resolve() for path in read))
        if inside or self.out.is_symlink() or not _is_staged(self.out):
            raise UsageError(
                "is not a directory that `gemma-deploy stage` made; --force does not delete it",
                where=str(self.out),
                next_step="name another directory",
            )


def _is_staged(out: Path) -> bool:
    if not out.is_dir():
        return False
    if not any(out.iterdir()):
        return True
    try:
        config, _ = read_json(out / CONFIG)
    except CheckpointError:
        return False
    return "auto_map" in config and "iter_num" in config


def _link_weights(checkpoint: Checkpoint, out: Path) -> None:
    """Weight files, all beside the index: one in a folder gets the folder into its name."""
    index = checkpoint.path / INDEX_NAME
    names = {checkpoint.local_name(file) for file in checkpoint.weight_files}
    content: dict[str, Any] = {}
    if SINGLE_NAME not in names:
        content, _ = read_json(index)
        names |= set(content["weight_map"].values())  # those of nothing but another tower too
    flat = {name: name.replace("/", "-") for name in names}
    for name, beside in flat.items():
        link_file(checkpoint.path / name, out / beside)
    if content and any(name != beside for name, beside in flat.items()):
        moved = {tensor: flat[name] for tensor, name in content["weight_map"].items()}
        _write_json(out / INDEX_NAME, content | {"weight_map": moved})
    elif content:
        link_file(index, out / INDEX_NAME)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_json(path, finite(value), indent=2, sort_keys=False, ensure_ascii=False)


def _write_weights(source: WeightSource, path: Path, progress: Tick | None, *, as_stored: bool) -> None:
    """Stream every tensor under its name here.

    Args:
        as_stored: in its own dtype; else as float32: a dequantized value fits no 16-bit type without loss.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, shapes = 0, expected_tensors(source.config)  # of experts three dimensions, which are read as two
    for name, info in source.tensors.items():
        dtype = BY_NAME[info.dtype if as_stored else "float32"]
        size = dtype.itemsize * math.prod(info.shape)
        header[name] = {"dtype": dtype.safetensors, "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    read = source.raw_rows if as_stored else source.rows
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, info in source.tensors.items():
            step = max(1, BLOCK_BYTES // (4 * math.prod(info.shape[1:])))
            for start in range(0, info.shape[0], step):
                file.write(read(name, start, min(start + step, info.shape[0])).data)
                if progress is not None:
                    progress(file.tell() - 8 - len(text), at)
