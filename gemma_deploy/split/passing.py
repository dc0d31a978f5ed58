"""What passes between parts where hidden states are not all that later layers read.

Layers of Gemma 3n, Gemma 4 E2B and E4B add a vector of each token, and the last ones read keys and values of earlier
ones. So token ids and embeddings pass on, out of which each part makes the vectors of its own layers, and keys and
values of new tokens, which a part that reads them puts into its own cache. Between two parts of an E2B that is at most
4,608 numbers and an id for each token; the vectors themselves would be up to 8,704 and all of their table in one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import Cache

from gemma_deploy.errors import UsageError
from gemma_deploy.partition.beside import Reads

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Passed:
    """What a part gives to the next one, in the place of hidden states.

    Args:
        hidden_states: [batch, seq, hidden]; of Gemma 3n [batch, seq, streams, hidden].
        input_ids: [batch, seq], and inputs_embeds: [batch, seq, hidden], scaled, where later layers add vectors of
            tokens; None where none do. Ids may be missing where the bottom was given embeddings.
        keys_values: layer of the model -> its keys and values [batch, kv_heads, seq, head_dim] of these tokens, where
            later parts read them.
    """

    hidden_states: torch.Tensor
    input_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    keys_values: Mapping[int, Pair] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by names, to be sent: `hidden_states`, `input_ids`, `inputs_embeds`, `key.13`, `value.13`."""
        found = {"hidden_states": self.hidden_states, "input_ids": self.input_ids, "inputs_embeds": self.inputs_embeds}
        named = {name: tensor for name, tensor in found.items() if tensor is not None}
        for layer, (key, value) in self.keys_values.items():
            named |= {f"key.{layer}": key, f"value.{layer}": value}
        return named

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Passed:
        """The same from what `tensors` gave.

        Raises:
            UsageError: names that it does not give.
        """
        plain = {name: tensors[name] for name in ("hidden_states", "input_ids", "inputs_embeds") if name in tensors}
        layers = [name.removeprefix("key.") for name in tensors if name.startswith("key.")]
        whole = {*plain, *(f"{part}.{layer}" for layer in layers for part in ("key", "value"))}
        if "hidden_states" not in plain or whole != set(tensors) or not all(layer.isdecimal() for layer in layers):
            raise UsageError(
                f"{', '.join(sorted(tensors)) or 'nothing'}: no part gives these tensors",
                expected="hidden_states, input_ids, inputs_embeds, and key.N with value.N",
                next_step="send all that `tensors` of the part before gives",
            )
        pairs = {int(layer): (tensors[f"key.{layer}"], tensors[f"value.{layer}"]) for layer in layers}
        return cls(**plain, keys_values=pairs)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Passed:
        return Passed.of({name: change(tensor) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Passed:
        """The same on that device."""
        return self._each(lambda tensor: tensor.to(device))

    def detach(self) -> Passed:
        """The same without a history: gradients end here."""
        return self._each(torch.Tensor.detach)

    def requires_grad_(self) -> Passed:
        """Collect gradients of all but ids, in place."""
        for tensor in self._floating():
            tensor.requires_grad_()
        return self

    @property
    def grad(self) -> Passed:
        """The gradients, zero of what no layer read; ids are left out."""
        made = self._each(lambda tensor: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
        return replace(made, input_ids=None)

    def backward(self, gradient: Passed) -> None:
        """Go on with gradients that came down from the next part."""
        made, wanted = list(self._floating()), list(gradient._floating())
        pairs = [pair for pair in zip(made, wanted, strict=True) if pair[0].requires_grad]
        torch.autograd.backward([tensor for tensor, _ in pairs], [value for _, value in pairs])

    def _floating(self) -> Iterator[torch.Tensor]:
        return (tensor for tensor in self.tensors.values() if tensor.is_floating_point())

    @property
    def shape(self) -> torch.Size:
        """Of the hidden states."""
        return self.hidden_states.shape

    @property
    def device(self) -> torch.device:
        """Of the hidden states."""
        return self.hidden_states.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.hidden_states.dtype


Hidden: TypeAlias = torch.Tensor | Passed


class NotingCache(Cache):
    """A part's cache, whose layers it shares, that remembers the new keys and values of some.

    Args:
        cache: whose layers they are; layers: numbers of the part.
    """

    def __init__(self, cache: Cache, layers: int) -> None:
        while len(cache.layers) < layers:  # made one by one where all are of one kind
            cache.layers.append(cache.layer_class_to_replicate())
        super().__init__(layers=cache.layers)
        self.new: dict[int, Pair] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **more: Any
    ) -> Pair:
        """As of any cache."""
        self.new[layer_idx] = key_states, value_states
        found: Pair = super().update(key_states, value_states, layer_idx, *args, **more)
        return found


class PartBeside:
    """What the layers of a part read beside the stream in one pass; see `Beside` in source_code/decoder_vacc.py.

    Args:
        reads: whose keys and values; vectors: [batch, seq, layers of the part, width], or None.
        entered: what came from the part before; cache: of this part, or None.
    """

    def __init__(
        self, reads: Reads, vectors: torch.Tensor | None, *, entered: Passed, cache: NotingCache | None
    ) -> None:
        self.reads, self.vectors, self.entered, self.cache = reads, vectors, entered, cache
        self.first_sharing = reads.first_sharing
        self.kept: dict[int, Pair] = {}

    def begin(self) -> None:
        """Put what came of earlier parts into this one's cache, when masks have been made of what was there before."""
        for source, place in self.reads.borrowed.items():
            new = self.entered.keys_values[source]
            self.kept[place] = new if self.cache is None else self.cache.update(*new, place)

    def source(self, layer_idx: int) -> int:
        """The layer of this part in whose cache this one's keys and values are."""
        return self.reads.places[layer_idx]

    def of_layer(self, layer_idx: int) -> dict[str, Any]:
        """Its vectors, and the keys and values that it reads of other layers."""
        more: dict[str, Any] = {}
        if self.vectors is not None:
            more["per_layer_input"] = self.vectors[:, :, layer_idx]
        if self.first_sharing is not None and layer_idx >= self.first_sharing:
            more["shared"] = self.kept[self.source(layer_idx)]
        return more

    def made(self, layer_idx: int, present: Pair | None) -> None:
        """Keep the keys and values of a layer that makes some."""
        if present is not None:
            self.kept[layer_idx] = present

    def last_positions(
        self, hidden: torch.Tensor, rotary: dict[str, Pair], masks: dict[str, torch.Tensor], count: int
    ) -> tuple[torch.Tensor, dict[str, Pair], dict[str, torch.Tensor]]:
        """Of the layers from here on the last positions alone are wanted."""
        if self.vectors is not None:
            self.vectors = self.vectors[:, -count:]
        turns = {kind: (cos[:, -count:], sin[:, -count:]) for kind, (cos, sin) in rotary.items()}
        return hidden[:, -count:], turns, {kind: mask[:, :, -count:] for kind, mask in masks.items()}

    def leaving(self, hidden: torch.Tensor, *, vectors_behind: bool) -> Passed:
        """What the next part is given.

        Args:
            vectors_behind: whether its layers add vectors of tokens.
        """
        new = self.kept if self.cache is None else self.cache.new
        pairs = {
            source: new[self.reads.made[source]] if source in self.reads.made else self.entered.keys_values[source]
            for source in self.reads.passed
        }
        beside = (self.entered.input_ids, self.entered.inputs_embeds) if vectors_behind else (None, None)
        return Passed(hidden, *beside, keys_values=pairs)


def as_is(value: torch.Tensor) -> torch.Tensor:
    """What stands in the place of steps that other parts take."""
    return value


def given(input_ids: None, embeds: torch.Tensor, *, beside: PartBeside) -> PartBeside:
    """In the place of a stack's own `beside`: that of the part, which its pass was given."""
    beside.begin()
    return beside
