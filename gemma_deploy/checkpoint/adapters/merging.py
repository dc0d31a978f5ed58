"""What adapters, one after the other, make of a checkpoint's tensors, and whether they go together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_deploy.checkpoint.adapters.adapter import Adapter
from gemma_deploy.checkpoint.adapters.sums import FirstFactors, Step, Sum, WithRows
from gemma_deploy.checkpoint.adapters.updates import LowRank, Replaced, TokenRows, Update
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.checkpoint.source import Rows, equal
from gemma_deploy.checkpoint.stored import Stored
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.reading import is_dir

_WEIGHT = re.compile(r"[+-]?([0-9]{1,9}(\.[0-9]{0,15})?|\.[0-9]{1,15})")


@dataclass(frozen=True)
class AdapterRef:
    """Which adapter, and how much of it.

    Args:
        path: its directory.
        weight: its products are multiplied by this, as `set_scale` of peft does; whole tensors are not.
    """

    path: str | Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """From `DIR` or `DIR:WEIGHT`; a directory whose name ends like a weight is taken as it is called."""
        path, _, weight = text.rpartition(":")
        if path and _WEIGHT.fullmatch(weight) and not is_dir(text):
            return cls(path, float(weight))
        return cls(text)

    def to_json(self) -> str | dict[str, object]:
        """As a recipe has it."""
        return str(self.path) if self.weight == 1 else {"path": str(self.path), "weight": self.weight}


def adapter_refs(value: Any) -> tuple[AdapterRef, ...]:
    """What `frontend.adapter` of a recipe says: a directory, or a list of directories or of `{path, weight}`."""
    parts = [] if value is None else [value] if isinstance(value, str) else value
    return tuple(AdapterRef(part) if isinstance(part, str) else AdapterRef(**part) for part in parts)


@dataclass(frozen=True)
class WeightedAdapter:
    """One of the adapters that are added.

    Args:
        adapter: it, opened.
        weight: see `AdapterRef`.
    """

    adapter: Adapter
    weight: float = 1.0

    def to_json(self) -> dict[str, object]:
        """For records: the directory's name, weight, fingerprint."""
        return {"path": self.adapter.path.name, "weight": self.weight, "fingerprint": self.adapter.fingerprint()}


def open_adapters(
    refs: Sequence[AdapterRef], config: ModelConfig, names: tuple[str, ...]
) -> tuple[WeightedAdapter, ...]:
    """Open adapters of a model; see `Adapter.open`.

    Raises:
        CheckpointError: of one that cannot be opened, or of all of them.
    """
    found, errors = [], []
    for ref in refs:
        try:
            found.append(WeightedAdapter(Adapter.open(ref.path, config, names=names), ref.weight))
        except CheckpointError as error:
            errors.append(error)
    if len(errors) > 1:
        problems = [f"{error.where}: {line}" for error in errors for line in (error.problems or (error.what,))]
        raise CheckpointError(
            f"{len(errors)} adapters cannot be taken", problems=problems, next_step=errors[0].next_step
        )
    if errors:
        raise errors[0]
    return tuple(found)


@dataclass(frozen=True)
class Merged:
    """What adapters make of a model.

    Args:
        places: name -> what stands in the place of the checkpoint's tensor; a head that is its own now is among them.
        tied: whether the head is still the token table.
        vocab_size: rows of both.
        notes: what a user should know.
    """

    places: Mapping[str, Rows]
    tied: bool
    vocab_size: int
    notes: tuple[str, ...]


def merge_places(adapters: Sequence[WeightedAdapter], own: Mapping[str, Rows], config: ModelConfig) -> Merged:
    """Put adapters onto a checkpoint's tensors; nothing is computed yet.

    Args:
        own: the checkpoint's tensors by name.
        config: of its model.

    Raises:
        CheckpointError: two adapters do not go together.
    """
    chains = _Chains(adapters, own, config)
    names = dict.fromkeys(name for one in adapters for name in (*one.adapter.updates, *one.adapter.bases))
    if config.tie_word_embeddings and names.keys() & {EMBEDDING_WEIGHT, HEAD_WEIGHT}:
        names |= dict.fromkeys((EMBEDDING_WEIGHT, HEAD_WEIGHT))
    found = {name: chains.of(name) for name in names}
    problems = chains.problems
    sizes = {found[name].entry.shape[0] for name in (EMBEDDING_WEIGHT, HEAD_WEIGHT) if name in found}
    if len(sizes) > 1 and not problems:
        problems.append(f"table and head have {' and '.join(map(str, sorted(sizes)))} rows once they are added")
    if problems:
        raise CheckpointError(
            "the adapters do not go together",
            where=", ".join(str(one.adapter.path) for one in adapters),
            problems=problems,
            next_step="leave one of them out, or merge them one after the other with `gemma-deploy merge`",
        )
    tied = config.tie_word_embeddings
    if tied and HEAD_WEIGHT in found:
        table, head = found[EMBEDDING_WEIGHT], found.pop(HEAD_WEIGHT)
        tied = table == head or (isinstance(table, Stored) and isinstance(head, Stored) and equal(table, head))
        if not tied:
            found[HEAD_WEIGHT] = head
    places = {name: place for name, place in found.items() if place is not own.get(name)}
    notes = list(chains.notes)
    if config.tie_word_embeddings and not tied:
        notes.append("the adapter makes another matrix of the head than of the token table: the two are no longer tied")
    vocabulary = max(sizes, default=config.vocab_size)
    if vocabulary != config.vocab_size:
        notes.append(f"the vocabulary has {vocabulary} tokens in place of {config.vocab_size}")
    return Merged(places, tied, vocabulary, tuple(notes))


class _Chains:
    """What adapters, one after the other, do to each tensor."""

    def __init__(self, adapters: Sequence[WeightedAdapter], own: Mapping[str, Rows], config: ModelConfig) -> None:
        self.adapters, self.own, self.config = adapters, own, config
        self.factors = FirstFactors()
        self.problems: list[str] = []
        self.notes: list[str] = []

    def of(self, name: str) -> Rows:
        """What stands in a tensor's place."""
        base = self._base(name)
        changes = [(one, one.adapter.updates[name]) for one in self.adapters if name in one.adapter.updates]
        whole = [(one, update) for one, update in changes if not isinstance(update, LowRank)]
        if whole and len(changes) > 1:
            paths = " and ".join(str(one.adapter.path) for one, _ in changes)
            self.problems.append(
                f"{name} is changed by {paths}, and {whole[0][0].adapter.path} puts other numbers there"
            )
            return base
        if not changes:
            return base
        if whole:
            ((one, update),) = changes
            if one.weight != 1:
                self.notes.append(
                    f"{name} is {one.adapter.path}'s own: its weight of {one.weight:g} does not count there"
                )
            return self._whole(base, update)
        steps = []
        for one, update in changes:
            assert isinstance(update, LowRank)
            steps.append(Step(update, update.scaling * one.weight))
            if update.shape != base.entry.shape:
                self.problems.append(
                    f"{one.adapter.path}: {update.second.name} is of a weight {list(update.shape)}, and {name} is "
                    f"{list(base.entry.shape)} by now"
                )
        return Sum(base, tuple(steps), self.factors)

    def _whole(self, base: Rows, update: Update) -> Rows:
        if isinstance(update, Replaced):
            return update.stored
        assert isinstance(update, TokenRows)
        return WithRows(base, update)

    def _base(self, name: str) -> Rows:
        """The checkpoint's tensor, or what an adapter brings in its place; a tied head's is the table's."""
        tied = self.config.tie_word_embeddings and name in (EMBEDDING_WEIGHT, HEAD_WEIGHT)
        wanted = (EMBEDDING_WEIGHT, HEAD_WEIGHT) if tied else (name,)
        brought = [(one, own) for one in self.adapters for key, own in one.adapter.bases.items() if key in wanted]
        for one, own in brought[1:]:
            if not equal(brought[0][1], own):
                self.problems.append(
                    f"{name} is {brought[0][0].adapter.path}'s own and {one.adapter.path}'s own, and they differ"
                )
        base: Rows = brought[0][1] if brought else self.own[EMBEDDING_WEIGHT if tied else name]
        if tied and name == HEAD_WEIGHT:  # rows that are trained are the head's too, under the factors that it has
            for one in self.adapters:
                rows, head = (one.adapter.updates.get(key) for key in (EMBEDDING_WEIGHT, HEAD_WEIGHT))
                if isinstance(rows, TokenRows) and isinstance(head, LowRank):
                    base = WithRows(base, rows)
        return base
