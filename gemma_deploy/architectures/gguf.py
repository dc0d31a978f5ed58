"""How llama.cpp writes a generation down: its name, names of tensors, and what metadata say of config.json's keys.

Names are those of llama.cpp's gguf-py (`constants.py`), which way a tensor goes those of its converter
(`conversion/gemma.py`). Metadata of a generation are named `NAME.key`; keys here are without the name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gemma_deploy.names import EMBEDDING_WEIGHT, HEAD_WEIGHT, LAYERS, NORM_WEIGHT

BLOCK = "blk."
# Names of what all generations have outside their layers.
OUTSIDE: Mapping[str, str] = {
    "token_embd.weight": EMBEDDING_WEIGHT,
    "output_norm.weight": NORM_WEIGHT,
    "output.weight": HEAD_WEIGHT,
}


class Metadata(Protocol):
    """What a GGUF file says beside its weights."""

    def __call__(self, key: str) -> Any:
        """The value of a key, None where there is none; only the length of a long list."""

    def problem(self, key: str, got: object, expected: str) -> None:
        """Remember that a key is missing (`got` is None) or wrong; all are told at once."""

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of that name, which is llama.cpp's."""

    def rows(self, tensor: str) -> int | None:
        """Of a tensor; None where there is none."""

    def numbers(self, tensor: str) -> Sequence[float] | None:
        """A vector that is no weight; None where there is none."""


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp writes a generation down.

    Args:
        name: `general.architecture`.
        blocks: part of a tensor's name between `blk.N.` and `.weight` -> name within the layer, before `.weight`.
        config: keys of config.json beside the sizes, or in their place, from what a file says.
        whole: the same for names that are not made that way, from end to end; outside: for those outside layers.
        stacked: tensors that hold several matrices -> where those are, before `.N.weight`.
        said: tensors that are no weights, but say what config.json says.
        keys: the inverse of `config`, without what all generations say: from a model's facts.
        tokenizer: llama.cpp's name of its kind; shown: control tokens that a reader of replies has to see.
        written: such files are made as well; with_head: llama.cpp reads an LM head beside the token table.
    """

    name: str
    blocks: Mapping[str, str]
    config: Callable[[Metadata], dict[str, Any]]
    whole: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, str] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    keys: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    tokenizer: str = "llama"
    shown: frozenset[str] = frozenset()
    written: bool = False
    with_head: bool = False

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a tensor; one that llama.cpp does not use for this generation stays as it is."""
        outside = {**OUTSIDE, **self.outside}
        if name in outside:
            return outside[name]
        number, _, rest = name.removeprefix(BLOCK).partition(".")
        part, _, kind = rest.rpartition(".")
        if name.startswith(BLOCK) and number.isdecimal():
            if rest in self.whole:
                return f"{LAYERS}{number}.{self.whole[rest]}"
            if kind == "weight" and part in self.blocks:
                return f"{LAYERS}{number}.{self.blocks[part]}.weight"
        return name

    def own_name(self, name: str) -> str:
        """The inverse of `hf_name`, of a tensor that is no part of another.

        Raises:
            KeyError: llama.cpp has no name for it.
        """
        outside = {**OUTSIDE, **self.outside}
        number, _, rest = name.removeprefix(LAYERS).partition(".")
        names = {f"{one}.weight": f"{part}.weight" for part, one in self.blocks.items()}
        names |= {one: part for part, one in self.whole.items()}
        if name.startswith(LAYERS):
            return f"{BLOCK}{number}.{names[rest]}"
        return {one: own for own, one in [*outside.items(), *((one, one) for one in self.said)]}[name]
