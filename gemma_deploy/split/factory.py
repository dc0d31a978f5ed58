"""Parts from a checkpoint or a directory: each reads its own tensors alone, a block of rows at a time."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from gemma_deploy.architectures import text_type
from gemma_deploy.checkpoint import Checkpoint, ModelConfig, WeightSource, expected_tensors
from gemma_deploy.checkpoint.safetensors_reader import SafetensorsFile
from gemma_deploy.errors import CheckpointError, UsageError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.names import CONFIG
from gemma_deploy.partition import Span, recommended_points, spans_of
from gemma_deploy.partition.mapper import ParameterMapper
from gemma_deploy.partition.spans import Share
from gemma_deploy.split.base import Part
from gemma_deploy.split.layout import WEIGHTS, part_config, read_part
from gemma_deploy.split.registry import part_class
from gemma_deploy.split.writing import write_split
from gemma_deploy.workdir import Maker, WorkDir
from gemma_deploy.writing import finite, write_json

BLOCK_BYTES = 8 << 20
SAVE_PART = Maker("save_part", CheckpointError)
log = logging.getLogger(__name__)


class ModelFactory:
    """Makes the parts of a model."""

    @staticmethod
    def create_split_models(
        model_type: str,
        model_name_or_path: str | Path,
        split_point_1: int | None = None,
        split_point_2: int | None = None,
        device: str | Sequence[str] = "cpu",
        dtype: torch.dtype | None = torch.float32,
        *,
        device_map: str | Mapping[str, str] | None = None,
        low_memory: bool = True,
        verbose: bool = False,
        storage_path: str | Path | None = None,
        auto_save: bool = False,
    ) -> tuple[Part, ...]:
        """Bottom (layers [0, a)), trunk ([a, b)) and top ([b, n)).

        Args:
            model_type: the checkpoint's, or that of a multimodal model of the same generation.
            model_name_or_path: a checkpoint (directory, .gguf file, `demo`).
            split_point_1: a; split_point_2: b. Without both, points that balance the parts' bytes; without b alone
                there is no trunk.
            device: one for all, or one for each part.
            dtype: of the parameters; None: the checkpoint's.
            device_map: the devices by the parts' names, `{"bottom": "cpu", "trunk": "cuda:0"}` (`device` for those not
                named), or "auto": with three CUDA devices each part has one, with two the trunk and the top, with one
                the trunk; the others are on `device`.
            low_memory: True. Each part is read on its own, tensor by tensor; no more than the parts is in memory.
            verbose: log each part's layers, parameters and MiB as information, not only for debugging.
            storage_path: with auto_save, a directory that will hold the parts as the checkpoint stores them, for
                `SplitChain.from_split` and `load_part`; the same as `gemma-deploy split` writes.
            auto_save: write them.

        Raises:
            UsageError: another model_type than the checkpoint's, points that do not cut it, too few devices, names of
                parts that are not there, a storage_path that exists, or one of storage_path and auto_save alone.
            CheckpointError: the checkpoint is damaged; NotBuiltError: no class is registered for a part.
        """
        if not low_memory:
            raise UsageError("low_memory is False, but parts are never read any other way", next_step="leave it out")
        if auto_save != (storage_path is not None):
            given, missing = ("auto_save", "storage_path") if auto_save else ("storage_path", "auto_save=True")
            raise UsageError(f"{given} without {missing} writes nothing", next_step="pass both, or neither")
        checkpoint = Checkpoint.open(model_name_or_path)
        config = checkpoint.config
        if text_type(model_type) != config.model_type:
            raise UsageError(
                f"model_type is {model_type!r}, and the checkpoint is a {config.model_type}",
                where=str(checkpoint.path),
                next_step=f'pass model_type="{config.model_type}"',
            )
        points = [point for point in (split_point_1, split_point_2) if point is not None]
        spans = spans_of(config.num_hidden_layers, points or recommended_points(config))
        devices = _devices([span.name for span in spans], device, device_map)
        if storage_path is not None:
            write_split(checkpoint, spans, Path(storage_path))
        parts = []
        for span, at in zip(spans, devices, strict=True):
            part = from_pretrained_split(checkpoint, span, device=at, dtype=dtype)
            figures = (span.name, span.start, span.stop - 1, f"{part.num_parameters():,}", part.memory_footprint_mb())
            log.log(
                logging.INFO if verbose else logging.DEBUG, "%s: layers %d to %d, %s parameters, %.1f MiB", *figures
            )
            parts.append(part)
        return tuple(parts)


def _devices(
    names: Sequence[str], device: str | Sequence[str], device_map: str | Mapping[str, str] | None
) -> list[str]:
    """A device for each part.

    Raises:
        UsageError: the words do not fit the parts.
    """
    if device_map is None:
        devices = [device] * len(names) if isinstance(device, str) else list(device)
        if len(devices) != len(names):
            raise UsageError(f"{len(devices)} devices for {len(names)} parts", next_step="name one for each part")
        return devices
    if not isinstance(device, str):
        raise UsageError("a list of devices and device_map say the same in two ways", next_step="keep one of them")
    if isinstance(device_map, str):
        if device_map != "auto":
            raise UsageError(
                f"device_map is {device_map!r}",
                expected='"auto", or a device for each part by its name',
                next_step=f"name the parts: {', '.join(names)}",
            )
        found = {3: ("bottom", "trunk", "top"), 2: ("trunk", "top"), 1: ("trunk",)}
        on_cuda = found.get(min(torch.cuda.device_count(), 3), ())
        device_map = {name: f"cuda:{number}" for number, name in enumerate(on_cuda) if name in names}
    elif unknown := sorted(set(device_map) - set(names)):
        raise UsageError(
            f"device_map names {', '.join(unknown)}", expected=", ".join(names), next_step="correct the names"
        )
    return [device_map.get(name, device) for name in names]


def from_pretrained_split(
    checkpoint: str | Path | Checkpoint,
    span: Span,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    embed_scale: str = "exact",
) -> Part:
    """One part of a checkpoint. No tensor of another part is read; the peak is this part and one block of rows.

    Raises:
        CheckpointError: tensors missing or left over; NotBuiltError: no class is registered for the part.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    part = part_class(opened.config.model_type, span.kind)(opened.config, span, embed_scale)
    stored, mapper = dtype or _dtype_of(opened.config, opened), ParameterMapper(opened.config, span)

    def read(local: str, source: str) -> torch.Tensor:
        give_memory_back()
        return read_tensor(opened, source, dtype=stored, device=device, share=mapper.shares.get(source))

    return part.fill(mapper, read, str(opened.path))


def read_tensor(
    weights: WeightSource,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    share: Share | None = None,
) -> torch.Tensor:
    """A tensor in its own memory and the shape that the model has it in, copied a block of rows at a time.

    Args:
        share: its rows or columns that are wanted; None: all of them.
    """
    shape = weights.tensors[name].shape
    tensor = torch.empty(shape if share is None else share.of_shape(shape), dtype=dtype, device=device)
    if tensor.is_meta:
        return tensor
    first = share.start if share is not None and share.axis == 0 else 0
    columns = slice(share.start, share.stop) if share is not None and share.axis == 1 else slice(None)
    step = max(1, BLOCK_BYTES * shape[0] // max(1, 4 * math.prod(shape)))
    for start in range(0, len(tensor), step):
        stop = min(start + step, len(tensor))
        rows = weights.rows(name, first + start, first + stop)
        tensor[start:stop].copy_(torch.from_numpy(rows if share is None else rows[:, columns]))
    return tensor if share is not None else tensor.reshape(expected_tensors(weights.config).get(name, shape))


def _dtype_of(config: ModelConfig, checkpoint: WeightSource) -> torch.dtype:
    """What the config says, as transformers takes it, else the weights' own."""
    named = config.raw.get("dtype") or config.raw.get("torch_dtype")
    stored = next(iter(checkpoint.tensors.values())).dtype
    names = [named, stored, "float32"]
    return next(found for name in names if isinstance(found := getattr(torch, str(name), None), torch.dtype))


def save_part(part: Part, directory: str | Path) -> Path:
    """Write config.json and model.safetensors of a part (fine-tuned, say); `load_part` reads them back.

    The directory is there whole or not at all.

    Raises:
        UsageError: the directory exists. BusyError: another process is writing it.
        CheckpointError: it cannot be written.
    """
    from safetensors.torch import save_file

    with _SavedPart(Path(directory), SAVE_PART) as saved:
        config = part_config(part.model_config, part.span, part.embed_scale)
        write_json(saved.path / CONFIG, finite(config), indent=2, sort_keys=False)
        tensors = {name: value.detach().contiguous() for name, value in part.state_dict().items()}
        save_file(tensors, saved.path / WEIGHTS, metadata={"format": "pt"})
        saved.publish()
    return saved.out


class _SavedPart(WorkDir):
    """Saves one part into a directory that does not exist yet."""

    def check(self) -> None:
        """Refuse to overwrite."""
        if os.path.lexists(self.out):
            raise UsageError("exists already", where=str(self.out), next_step="choose another place, or remove it")


def load_part(directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Part:
    """A part that `save_part` or `gemma-deploy split` wrote.

    Raises:
        CheckpointError: the directory holds none, or one whose tensors do not fit.
    """
    from safetensors import safe_open

    directory = Path(directory)
    config, span, scale = read_part(directory)
    mapper = ParameterMapper(config, span)
    entries = SafetensorsFile(directory / WEIGHTS).entries  # its header, with more checks than the library's
    mapper.check(entries, str(directory / WEIGHTS))
    for local, entry in entries.items():
        mapper.check_shape(local, entry.shape, str(directory / WEIGHTS))
    part = part_class(config.model_type, span.kind)(config, span, scale)
    with safe_open(directory / WEIGHTS, framework="pt", device=device) as weights:

        def read(local: str, source: str) -> torch.Tensor:
            value: torch.Tensor = weights.get_tensor(local)
            return value if dtype is None else value.to(dtype)

        return part.fill(mapper, read, str(directory / WEIGHTS))
