"""Parts from a checkpoint or a directory: each reads its own tensors alone, a block of rows at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemma_deploy.checkpoint import Checkpoint, ModelConfig
from gemma_deploy.errors import CheckpointError, UsageError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.partition import Span, recommended_points, spans_of
from gemma_deploy.partition.mapper import ParameterMapper
from gemma_deploy.split.parts import Part
from gemma_deploy.split.registry import part_class

BLOCK_BYTES = 8 << 20
PART_KEY, WEIGHTS, INDEX = "gemma_deploy_part", "model.safetensors", "split.json"
ALIASES = {"gemma3": "gemma3_text"}


class ModelFactory:
    """Makes the parts of a model."""

    @staticmethod
    def create_split_models(
        model_type: str,
        model_name_or_path: str | Path,
        split_point_1: int | None = None,
        split_point_2: int | None = None,
        device: str | Sequence[str] = "cpu",
        dtype: torch.dtype | None = None,
    ) -> tuple[Part, ...]:
        """Bottom (layers [0, a)), trunk ([a, b)) and top ([b, n)).

        Args:
            model_type: `gemma`, `gemma2` or `gemma3_text`; must be the checkpoint's.
            model_name_or_path: a checkpoint (directory, .gguf file, `demo`).
            split_point_1: a; split_point_2: b. Without both, points that balance the parts' bytes; without b alone
                there is no trunk.
            device: one for all, or one for each part.
            dtype: of the parameters; the checkpoint's by default.

        Raises:
            UsageError: another model_type than the checkpoint's, points that do not cut it, or too few devices.
            CheckpointError: the checkpoint is damaged; NotBuiltError: no class is registered for a part.
        """
        checkpoint = Checkpoint.open(model_name_or_path)
        config = checkpoint.config
        if ALIASES.get(model_type, model_type) != config.model_type:
            raise UsageError(
                f"model_type is {model_type!r}, and the checkpoint is a {config.model_type}",
                where=str(checkpoint.path),
                next_step=f'pass model_type="{config.model_type}"',
            )
        points = [point for point in (split_point_1, split_point_2) if point is not None]
        spans = spans_of(config.num_hidden_layers, points or recommended_points(config))
        devices = [device] * len(spans) if isinstance(device, str) else list(device)
        if len(devices) != len(spans):
            raise UsageError(f"{len(devices)} devices for {len(spans)} parts", next_step="name one for each part")
        return tuple(
            from_pretrained_split(checkpoint, span, device=at, dtype=dtype)
            for span, at in zip(spans, devices, strict=True)
        )


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
    mapper = ParameterMapper(opened.config, span)
    mapper.check((name for name, _ in part.named_parameters()), str(opened.path))
    dtype = dtype or _dtype_of(opened.config, opened)
    for local, source in mapper.sources.items():
        _assign(part, local, _read(opened, source, torch.device(device), dtype))
        give_memory_back()
    return part.eval()


def _read(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in its own memory, copied a block of rows at a time."""
    shape = checkpoint.tensors[name].shape
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "meta":
        return tensor
    step = max(1, BLOCK_BYTES * shape[0] // max(1, 4 * tensor.numel()))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        tensor[start:stop].copy_(torch.from_numpy(checkpoint.rows(name, start, stop)))
    return tensor


def _dtype_of(config: ModelConfig, checkpoint: Checkpoint) -> torch.dtype:
    """What the config says, as transformers takes it, else the weights' own."""
    named = config.raw.get("dtype") or config.raw.get("torch_dtype")
    stored = next(iter(checkpoint.tensors.values())).dtype
    names = [named, stored, "float32"]
    return next(found for name in names if isinstance(found := getattr(torch, str(name), None), torch.dtype))


def _assign(part: nn.Module, name: str, value: torch.Tensor) -> None:
    module_name, _, parameter = name.rpartition(".")
    part.get_submodule(module_name).register_parameter(parameter, nn.Parameter(value))


def part_config(config: ModelConfig, span: Span, embed_scale: str = "exact") -> dict[str, Any]:
    """config.json of a part: the whole model's with all its stop tokens, and which part this is."""
    here = {"name": span.name, "start": span.start, "stop": span.stop, "embed_scale": embed_scale}
    return {**config.raw, "eos_token_id": list(config.eos_token_ids), PART_KEY: here}


def save_part(part: Part, directory: str | Path) -> Path:
    """Write config.json and model.safetensors of a part (fine-tuned, say); `load_part` reads them back.

    The directory is written under a temporary name and renamed.

    Raises:
        UsageError: the directory exists.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    if directory.exists():
        raise UsageError("exists already", where=str(directory), next_step="choose another place, or remove it")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = part_config(part.model_config, part.span, part.embed_scale)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: value.detach().contiguous() for name, value in part.named_parameters()}
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    partial.rename(directory)
    return directory


def load_part(directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Part:
    """A part that `save_part` or `gemma-deploy split` wrote.

    Raises:
        CheckpointError: the directory holds none, or one whose tensors do not fit.
    """
    from safetensors import safe_open

    directory = Path(directory)
    file = directory / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        here = raw.pop(PART_KEY)
        start, stop, scale = int(here["start"]), int(here["stop"]), str(here["embed_scale"])
        name = str(here["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"is not the config of a part ({type(error).__name__}: {error})",
            where=str(file),
            expected=f"config.json with {PART_KEY}",
            next_step="make parts with `gemma-deploy split`, or with save_part",
        ) from error
    config = ModelConfig.from_dict(raw, str(file))
    span = Span(name, start, stop, start == 0, stop == config.num_hidden_layers)
    part = part_class(config.model_type, span.kind)(config, span, scale)
    mapper = ParameterMapper(config, span)
    with safe_open(directory / WEIGHTS, framework="pt", device=device) as weights:
        mapper.check(weights.keys(), str(directory / WEIGHTS))
        for local, source in mapper.sources.items():
            value = weights.get_tensor(local)
            if tuple(value.shape) != mapper.shapes[source]:
                raise CheckpointError(
                    f"{local} is {list(value.shape)}, expected {list(mapper.shapes[source])}",
                    where=str(directory / WEIGHTS),
                    next_step="split the checkpoint again with `gemma-deploy split`",
                )
            _assign(part, local, value if dtype is None else value.to(dtype))
    return part.eval()


def read_split(directory: Path) -> list[str]:
    """Names of the parts in a directory that `gemma-deploy split` wrote, in order.

    Raises:
        CheckpointError: it holds no finished split.
    """
    file = directory / INDEX
    try:
        return [str(part["name"]) for part in json.loads(file.read_text(encoding="utf-8"))["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"no split model: {INDEX} cannot be read ({type(error).__name__})",
            where=str(directory),
            next_step="make one with `gemma-deploy split CHECKPOINT OUT`",
        ) from error
