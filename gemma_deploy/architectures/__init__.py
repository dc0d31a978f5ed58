"""The generations of Gemma. One is a module here and a row below; base.py says what a row holds. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from gemma_deploy.architectures.base import (
    EXACT_GELU,
    FULL,
    LAYER_TYPES,
    SLIDING,
    SWITCHES,
    TANH_GELU,
    Activation,
    Architecture,
    Axis,
    Branch,
    InputGroup,
    LayerSpec,
    LayerType,
    Linear,
    Rope,
)
from gemma_deploy.architectures.blocks import AltUp, Experts, Laurel, PerLayer, PerLayerTable
from gemma_deploy.architectures.drafting import Drafting
from gemma_deploy.architectures.embedding_gemma import EMBEDDING_GEMMA
from gemma_deploy.architectures.embedding_gemma2 import EMBEDDING_GEMMA2
from gemma_deploy.architectures.gemma import GEMMA
from gemma_deploy.architectures.gemma2 import GEMMA2
from gemma_deploy.architectures.gemma3 import GEMMA3
from gemma_deploy.architectures.gemma3n import GEMMA3N
from gemma_deploy.architectures.gemma4 import GEMMA4, GEMMA4_UNIFIED
from gemma_deploy.architectures.gemma4_assistant import GEMMA4_ASSISTANT, GEMMA4_UNIFIED_ASSISTANT
from gemma_deploy.architectures.gguf import Gguf, Metadata
from gemma_deploy.architectures.gguf_keys import FREQUENCIES, TURNED, UNTURNED
from gemma_deploy.architectures.vaultgemma import VAULTGEMMA
from gemma_deploy.errors import NotBuiltError

# What makes no text of its own, but guesses for a row.
DRAFTERS: tuple[Architecture, ...] = (GEMMA4_ASSISTANT, GEMMA4_UNIFIED_ASSISTANT)
ROWS: tuple[Architecture, ...] = (
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA3N,
    VAULTGEMMA,
    GEMMA4,
    GEMMA4_UNIFIED,
    EMBEDDING_GEMMA,
    EMBEDDING_GEMMA2,
)


def model_types() -> tuple[str, ...]:
    """All model types that a config.json may say, in the order of the rows."""
    return tuple(row.model_type for row in ROWS if not row.written_as)


def find(model_type: object) -> Architecture | None:
    """The row of a model type, None where there is none."""
    return next((row for row in (*ROWS, *DRAFTERS) if row.model_type == model_type), None)


def of_config(raw: Mapping[str, Any]) -> Architecture | None:
    """The row of a config.json; None where its model type is unknown.

    What reads in both directions is a row of its own; where a generation has none, its decoder's is returned.
    """
    kind = raw.get("model_type")
    if raw.get("use_bidirectional_attention"):
        encoder = next((row for row in ROWS if row.encoder and row.written_as == kind), None)
        if encoder is not None:
            return encoder
    return find(kind) if kind in (*model_types(), *(row.model_type for row in DRAFTERS)) else None


def architecture_of(model_type: str) -> Architecture:
    """The row of a model type.

    Raises:
        NotBuiltError: there is none.
    """
    found = find(model_type)
    if found is None:
        raise NotBuiltError(
            f"model_type {model_type!r} is none that this version knows{nearest(model_type, model_types())}",
            expected="one of " + ", ".join(model_types()),
            next_step=f"use a text checkpoint of {names()}",
        )
    return found


def by_gguf_name() -> dict[str, tuple[Architecture, Gguf]]:
    """Rows, and what llama.cpp calls theirs, by a GGUF file's `general.architecture`."""
    return {row.gguf.name: (row, row.gguf) for row in ROWS if row.gguf is not None}


def text_type(model_type: str) -> str:
    """The model type of the text model: that of the language model where `model_type` is a multimodal one's."""
    row = by_multimodal(model_type)
    return model_type if row is None else row.model_type


def by_multimodal(model_type: object) -> Architecture | None:
    """The row of a multimodal model's language model, None where `model_type` is no such model's."""
    return next((row for row in (*ROWS, *DRAFTERS) if model_type in row.multimodal), None)


def multimodal_types() -> tuple[str, ...]:
    """Model types of multimodal models whose language model is one of these."""
    return tuple(name for row in ROWS for name in row.multimodal)


def nearest(name: object, known: Collection[str]) -> str:
    """`; the nearest known one is ...`, or nothing."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; the nearest known one is {near[0]!r}" if near else ""


def names(*, gguf: bool = False) -> str:
    """The generations that generate text, for people: `Gemma 1, Gemma 2 or Gemma 3`.

    Args:
        gguf: those alone whose GGUF files are read.
    """
    *first, last = (row.name for row in ROWS if not row.encoder and (row.gguf or not gguf))
    return f"{', '.join(first)} or {last}" if first else last


@cache
def branches() -> tuple[Branch, ...]:
    """One branch for each module that is a branch of some generation's layers, in running order; norms differ."""
    found: dict[str, Branch] = {}
    for branch in (branch for row in ROWS for branch in row.branches):
        found.setdefault(branch.module, branch)
    return tuple(found.values())


def input_groups() -> tuple[InputGroup, ...]:
    """Both input groups of `branches`, in running order; norms differ between generations."""
    return tuple(group for branch in branches() for group in (branch.entry, branch.exit))


@cache
def inner_modules(branch: str) -> tuple[str, ...]:
    """Modules inside branches of that name, of all generations."""
    every = (one for row in ROWS for one in row.branches if one.module == branch)
    return tuple(dict.fromkeys(name for one in every for name in one.inner))


@cache
def cached_kinds() -> tuple[str, ...]:
    """Last parts of the names of the linears that make keys and values."""
    groups = (branch.entry for branch in branches() if branch.attends)
    return tuple(reader.rpartition(".")[2] for group in groups for reader in group.readers[1:])


@cache
def linear_kinds() -> tuple[str, ...]:
    """Last parts of the names of all linears of layers: `q_proj`, ..."""
    return tuple(dict.fromkeys(reader.rpartition(".")[2] for group in input_groups() for reader in group.readers))


__all__ = [
    "DRAFTERS",
    "EXACT_GELU",
    "FREQUENCIES",
    "FULL",
    "LAYER_TYPES",
    "ROWS",
    "SLIDING",
    "SWITCHES",
    "TANH_GELU",
    "TURNED",
    "UNTURNED",
    "Activation",
    "AltUp",
    "Architecture",
    "Axis",
    "Branch",
    "Drafting",
    "Experts",
    "Gguf",
    "InputGroup",
    "Laurel",
    "LayerSpec",
    "LayerType",
    "Linear",
    "Metadata",
    "PerLayer",
    "PerLayerTable",
    "Rope",
    "architecture_of",
    "branches",
    "by_gguf_name",
    "by_multimodal",
    "cached_kinds",
    "find",
    "inner_modules",
    "input_groups",
    "linear_kinds",
    "model_types",
    "multimodal_types",
    "names",
    "nearest",
    "of_config",
    "text_type",
]
