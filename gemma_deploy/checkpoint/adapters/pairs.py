"""The factors of one module: whether both are there, fit each other, the weight, and the rank the settings say.

Biases are only let through where they are zero: see `biases_that_count`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from gemma_deploy.checkpoint.adapters.settings import AdapterSettings
from gemma_deploy.checkpoint.adapters.updates import AdapterTensor, LowRank, TokenRows, Update
from gemma_deploy.names import EMBEDDING

FACTORS = {False: ("A", "B"), True: ("embedding_B", "embedding_A")}  # of an embedding: first [in, r], second [r, out]
HALVES = {"A": "lora_A", "B": "lora_B", "embedding_A": "lora_embedding_A", "embedding_B": "lora_embedding_B"}
# Part that is a bias -> what it is, and why it cannot be taken where it is not zero.
BIASES = {
    "lora_bias": ("of lora_B", "no merged checkpoint can hold it, and peft's merge refuses it for the same reason"),
    "bias": ("of a base", "the adapter was trained on another model (attention_bias)"),
}


@dataclass
class Module:
    """The tensors of one module.

    Args:
        path: of the module here; trained: in the model that was trained.
        parts: part (`naming.PARTS`) -> the tensor.
    """

    path: str
    trained: str
    parts: dict[str, AdapterTensor] = field(default_factory=dict)


def is_named(module: Module, name: str) -> bool:
    """Whether a key of trainable_token_indices is about a module: the end of its path, or "" for the table."""
    return module.path == EMBEDDING if name == "" else module.trained.endswith(name)


def biases_that_count(modules: Iterable[Module]) -> list[str]:
    """What is wrong with biases, a line for each kind: those that are not zero have no place in a Gemma's checkpoint.

    peft stores `lora_B.bias` with `lora_bias=True`, and adds scaling times it to the linear's output; with `bias="all"`
    or "lora_only" it stores the biases of the base, of which a Gemma has none.
    """
    lines = []
    for part, (what, why) in BIASES.items():
        stored = [module.parts[part] for module in modules if part in module.parts]
        lines += [f"{one.name} is no vector" for one in stored if len(one.entry.shape) != 1]
        counting = [one.name for one in stored if len(one.entry.shape) == 1 and np.any(one.whole())]
        if counting:
            rest = len(counting) - 1
            more = f", and so are {rest} more biases {what}" if rest else ""
            lines.append(f"{counting[0]} is a bias that is not zero{more}: the linears of a Gemma have no bias: {why}")
    return lines


def read_module(module: Module, shape: tuple[int, ...], settings: AdapterSettings) -> tuple[Update | None, list[str]]:
    """What a module's factors, or its trained rows, do to its weight; and everything that is wrong with them.

    Args:
        shape: of the weight, [out, in].
    """
    embedding = module.path == EMBEDDING
    strange = [part for part in FACTORS[not embedding] if part in module.parts]
    problems = [f"unexpected: {module.parts[part].name}: {module.path} is {_kind(embedding)}" for part in strange]
    if strange or len(shape) != 2:
        factors = [one.name for part, one in module.parts.items() if part in HALVES and part not in strange]
        return None, problems + [f"unexpected: {name}: {module.path} is no linear" for name in factors]
    halves = FACTORS[embedding]
    there = [part for part in halves if part in module.parts]
    update: Update | None = None
    if len(there) == 1:
        (absent,) = set(halves) - set(there)
        problems.append(f"half of a pair: {module.parts[there[0]].name} is there, and no {HALVES[absent]} beside it")
    elif there:
        update, wrong = _factors(module, shape, settings)
        problems += wrong
    elif "magnitude" in module.parts or "lora_bias" in module.parts:
        part = module.parts.get("magnitude") or module.parts["lora_bias"]
        problems.append(f"half of a pair: {part.name} is there, and no factors beside it")
    if "tokens" in module.parts:
        rows, wrong = _tokens(module, shape, settings)
        problems += wrong
        if update is not None:
            problems.append(
                f"{module.parts['tokens'].name}: rows of {module.path} are trained, and factors added to it"
            )
        update = rows
    return update, problems


def _kind(embedding: bool) -> str:
    return "an embedding" if embedding else "no embedding"


def _factors(module: Module, shape: tuple[int, ...], settings: AdapterSettings) -> tuple[LowRank | None, list[str]]:
    embedding = module.path == EMBEDDING
    first, second = (module.parts[part] for part in FACTORS[embedding])
    empty = [one.name for one in (first, second) if len(one.entry.shape) != 2 or 0 in one.entry.shape]
    if empty:
        gathered = "save it with the shards gathered (DeepSpeed ZeRO-3, FSDP)"
        return None, [f"{name} is empty or no matrix: {gathered}" for name in empty]
    one, other = (part.entry.shape[::-1] if embedding else part.entry.shape for part in (first, second))
    problems = []
    if one[0] != other[1]:
        problems.append(
            f"ranks do not multiply: {first.name} is {list(first.entry.shape)} and {second.name} "
            f"{list(second.entry.shape)}"
        )
    rank = settings.rank_of(module.trained)
    if one[0] == other[1] and one[0] != rank:
        problems.append(f"{first.name} is of rank {one[0]}, adapter_config.json says {rank}")
    outputs = (other[0],) if embedding else shape[:1]  # a table may have been resized; see Adapter
    if (other[0], one[1]) != (*outputs, shape[1]):
        problems.append(
            f"wrong shape: {first.name} and {second.name} are of a weight {[other[0], one[1]]}, "
            f"{module.path}.weight is {list(shape)}"
        )
    magnitude = module.parts.get("magnitude")
    length = shape[1] if embedding else shape[0]
    if settings.use_dora and magnitude is None:
        problems.append(f"half of a pair: use_dora is set, and {module.trained} has no lora_magnitude_vector")
    elif magnitude is not None and not settings.use_dora:
        problems.append(f"{magnitude.name} is there, and use_dora is not set")
    elif magnitude is not None and magnitude.entry.shape not in ((length,), (1, length), (length, 1)):
        problems.append(f"wrong shape: {magnitude.name} is {list(magnitude.entry.shape)}, expected {[length]}")
    if problems:
        return None, problems
    scaling = settings.scaling_of(module.trained, rank)
    return LowRank(first, second, rank, scaling, embedding, magnitude), []


def _tokens(module: Module, shape: tuple[int, ...], settings: AdapterSettings) -> tuple[TokenRows, list[str]]:
    stored = module.parts["tokens"]
    asked = settings.trainable_token_indices
    indices = next((rows for name, rows in asked.items() if is_named(module, name)), ())
    expected = (len(indices), shape[1])
    problems = []
    if stored.entry.shape != expected:
        problems.append(
            f"wrong shape: {stored.name} is {list(stored.entry.shape)}, trainable_token_indices calls for "
            f"{list(expected)}"
        )
    return TokenRows(stored, indices), problems
