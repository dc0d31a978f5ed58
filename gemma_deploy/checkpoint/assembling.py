"""What files hold against what their config calls for: every tensor of the model in its place, or one error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from gemma_deploy.architectures.drafting import TOKEN_ORDERING
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.checkpoint.expected import expected_tensors, unread_tensors
from gemma_deploy.checkpoint.naming import name_tensors
from gemma_deploy.checkpoint.quantized.matrix import MisfitError, QuantizedWeight
from gemma_deploy.checkpoint.quantized.modules import Modules
from gemma_deploy.checkpoint.safetensors_reader import readable
from gemma_deploy.checkpoint.shapes import as_matrix
from gemma_deploy.checkpoint.source import TensorInfo, equal
from gemma_deploy.checkpoint.stored import Stored
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import EMBEDDING_WEIGHT, HEAD_WEIGHT

ORDERS = ("int64", "int32")  # dtypes of ids of tokens
Place: TypeAlias = Stored[Any] | QuantizedWeight


@dataclass(frozen=True)
class Assembled:
    """A model's tensors.

    Args:
        config: of the model; a head that is no table is said there.
        places: what each tensor is read from, by its name here and in model order.
        notes: what a user should know.
    """

    config: ModelConfig
    places: Mapping[str, Place]
    notes: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The model's tensors in order."""
        return {name: info_of(name, place) for name, place in self.places.items()}


def info_of(name: str, place: Place) -> TensorInfo:
    """A tensor under its name here; bytes are those in the files."""
    entry = place.entry
    return TensorInfo(name, as_matrix(entry.shape), entry.dtype, place.file.path, int(place.nbytes))


def assemble(
    path: Path, config: ModelConfig, modules: Modules, *, gguf: bool, behind: Mapping[str, Stored[Any]] | None = None
) -> Assembled:
    """Compare what is there with what the config calls for.

    Args:
        path: of the checkpoint, for messages; modules: what its files hold; gguf: whether it is a .gguf file.
        behind: what lies in files of its own, behind an encoder.

    Raises:
        CheckpointError: everything missing, unexpected or misshaped.
    """
    expected, behind = expected_tensors(config), behind or {}
    inside = [name for name in expected if name not in behind]
    unread = unread_tensors(config)
    named = name_tensors(modules.names, inside, tied=config.tie_word_embeddings, unread=unread)
    problems = [f"missing: {name} {list(expected[name])}" for name in inside if name not in named.sources]
    problems += [f"unexpected: {name} {modules.shape_of(name)}" for name in named.extras]
    problems += [f"twice: {names} are one tensor of the model" for names in named.twice]
    problems += modules.twice(named.sources.values())
    shapes = expected | ({HEAD_WEIGHT: expected[EMBEDDING_WEIGHT]} if HEAD_WEIGHT in named.sources else {})
    places: dict[str, Place] = {}
    for name, source in named.sources.items():
        try:
            places[name] = modules.place(source)
        except MisfitError as error:
            problems.append(f"wrong codes: {error}")
    places |= behind
    for name, place in places.items():
        problems += _problems(place, shapes[name], gguf=gguf)
    problems += modules.problems(named.sources.values())
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensor(s) do not fit the config",
            where=str(path),
            problems=problems,
            next_step="convert it again with a current llama.cpp"
            if gguf
            else "make sure config.json and the weights belong together and every shard is there",
        )
    notes = list(named.notes)
    linears = sum(len(shape) == 2 and ".layers." in name for name, shape in expected.items())
    notes += modules.notes(named.sources, linears)
    if config.tie_word_embeddings and HEAD_WEIGHT in places:
        config = _tied_or_not(config, places, notes)
    notes.extend(config.warnings)
    return Assembled(config, {name: places[name] for name in expected_tensors(config)}, tuple(notes))


def _problems(place: Place, shape: tuple[int, ...], *, gguf: bool) -> list[str]:
    entry = place.entry
    if entry.shape != shape:
        said = "the metadata call for" if gguf else "config.json calls for"
        return [f"wrong shape: {place.name} is {list(entry.shape)}, {said} {list(shape)}"]
    if place.name.endswith(TOKEN_ORDERING) and entry.dtype in ORDERS:
        return []
    if not gguf and not readable(entry.dtype):
        return [f"wrong dtype: {place.name} is {entry.dtype}, expected bfloat16, float16 or float32"]
    return []


def _tied_or_not(config: ModelConfig, places: Mapping[str, Place], notes: list[str]) -> ModelConfig:
    """Keep a head beside the table apart when it is another matrix, whatever the config says, as transformers does."""
    if equal(places[HEAD_WEIGHT], places[EMBEDDING_WEIGHT]):
        notes.append(f"{HEAD_WEIGHT} is ignored: it equals the token table, to which the config ties it")
        return config
    notes.append(
        f"{HEAD_WEIGHT} differs from the token table although tie_word_embeddings is true: the two are kept apart, as "
        "transformers does; set tie_word_embeddings to false in config.json to say so"
    )
    return replace(config, tie_word_embeddings=False, raw={**config.raw, "tie_word_embeddings": False})


def merged_info(name: str, place: Any, file: Path) -> TensorInfo:
    """Of a tensor that adapters changed; the file is the one its base lies in."""
    shape, dtype = place.entry.shape, place.entry.dtype
    return TensorInfo(name, shape, dtype, file, math.prod(shape) * BY_NAME[dtype].itemsize)
