"""An adapter that peft wrote: opened, checked against a model, and read tensor by tensor. Imports no torch.

Everything that can be wrong is found here, before any work: fields that are not carried out, names and shapes of
another base, half of a pair, ranks that disagree, numbers that are none.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from gemma_deploy.checkpoint.adapters.naming import Named, name_of
from gemma_deploy.checkpoint.adapters.pairs import Module, biases_that_count, is_named, read_module
from gemma_deploy.checkpoint.adapters.settings import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterSettings,
    is_in,
    matches,
    refuse_other_adapters,
)
from gemma_deploy.checkpoint.adapters.updates import AdapterTensor, LowRank, Replaced, TokenRows, Update
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.checkpoint.expected import expected_tensors
from gemma_deploy.checkpoint.safetensors_reader import SafetensorsFile, readable
from gemma_deploy.checkpoint.source import equal
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import EMBEDDING, EMBEDDING_WEIGHT, HEAD, HEAD_WEIGHT
from gemma_deploy.reading import expand

CHECKED_BYTES = 8 << 20  # of a tensor at a time


@dataclass(frozen=True)
class Adapter:
    """An open adapter; make one with `Adapter.open`.

    Args:
        path: its directory.
        settings: what adapter_config.json says.
        updates: name of a tensor of the model -> what is done to it. Of a model whose head is its table there is one
            for `lm_head.weight` where peft's model changes the head, be it in the same way as the table.
        bases: table and head that stand in the place of the checkpoint's, under the updates: a vocabulary that was
            resized, or a table saved because it was adapted.
        notes: what a user should know.
    """

    path: Path
    settings: AdapterSettings
    updates: Mapping[str, Update]
    bases: Mapping[str, AdapterTensor]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path, config: ModelConfig, *, names: tuple[str, ...] = ()) -> Adapter:
        """Open a directory that peft's `save_pretrained` wrote, and check it against a model.

        Args:
            path: the directory.
            config: of the model that it is to be added to.
            names: what the model is called, besides what its config says; compared with what the adapter says.

        Raises:
            CheckpointError: it is no LoRA in safetensors, asks for what is not carried out, is damaged, or belongs to
                another model; every offender in one message.
        """
        directory = expand(path)
        refuse_other_adapters(directory)
        settings = AdapterSettings.read(directory)
        file = SafetensorsFile(directory / WEIGHTS_NAME)
        found = _Reader(file, settings, config)
        found.read()
        stranger = _other_base(settings.base, config, names)
        if found.problems:
            said = f"; it says that its base is {settings.base}" if settings.base else ""
            raise CheckpointError(
                f"{len(found.problems)} thing(s) in the adapter do not fit the model{said}",
                where=str(directory / WEIGHTS_NAME),
                problems=found.problems,
                expected=f"an adapter of a {config.model_type} with {config.num_hidden_layers} layers of "
                f"{config.hidden_size} channels and {config.vocab_size} tokens",
                next_step="train the adapter without biases"
                if found.problems == found.biases
                else "pass the checkpoint that the adapter was trained on",
            )
        notes = (*settings.notes, *found.notes, *([stranger] if stranger else []))
        return cls(directory, settings, found.updates, found.bases, notes)

    @property
    def files(self) -> tuple[Path, Path]:
        """The two files that are read."""
        return self.path / CONFIG_NAME, self.path / WEIGHTS_NAME

    def fingerprint(self) -> str:
        """Sha256 over both files; they are read again where size or time say that they changed."""
        return _digest_of(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files))


@lru_cache(maxsize=16)
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files as they are at a size and a time."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


class _Reader:
    """Sorts the tensors of a file, and collects what is wrong with them."""

    def __init__(self, file: SafetensorsFile, settings: AdapterSettings, config: ModelConfig) -> None:
        self.file, self.settings, self.config = file, settings, config
        self.shapes = expected_tensors(config)
        if config.tie_word_embeddings:
            self.shapes[HEAD_WEIGHT] = self.shapes[EMBEDDING_WEIGHT]
        self.updates: dict[str, Update] = {}
        self.bases: dict[str, AdapterTensor] = {}
        self.problems: list[str] = []
        self.biases: list[str] = []  # of `problems`, those about biases
        self.notes: list[str] = []

    def read(self) -> None:
        """Fill `updates` and `bases`."""
        modules = self._modules()
        self._rows_of_whole(modules)
        self._drop_tied_rows(modules)
        if not self.problems:
            self.problems += self._not_finite()
        if self.problems:
            return
        for module in modules:
            self._one(module)
        self.biases = biases_that_count(modules)
        self.problems += self.biases
        self._vocabulary()
        self._rows_in_reach()
        self._absent(modules)
        if self.config.tie_word_embeddings and not self.problems:
            self._tied(modules)
        if not self.updates and not self.bases and not self.problems:
            self.problems.append("it holds no tensor that changes the model")
        self._ambiguous(modules)

    def _modules(self) -> list[Module]:
        """Tensors by the module that they are of."""
        known = {name.removesuffix(".weight") for name in self.shapes}
        found: dict[str, Module] = {}
        towers: Counter[str] = Counter()
        multimodal = ""
        for stored, entry in self.file.entries.items():
            named = name_of(stored, known)
            multimodal = multimodal or (named.trained if named.multimodal else "")
            if named.tower:
                towers[named.tower] += 1
            elif named.module is None or not named.part:
                self.problems.append(f"unexpected: {stored} {list(entry.shape)}")
            elif not readable(entry.dtype):
                self.problems.append(f"wrong dtype: {stored} is {entry.dtype}, expected bfloat16, float16 or float32")
            else:
                module = found.setdefault(named.module, Module(named.module, named.trained))
                self._add(module, named)
        if multimodal:
            self.notes.append(
                f"the adapter was trained on the multimodal class (names like {multimodal}): what it does to the text "
                "model is taken over"
            )
        self.notes += [
            f"{count} tensor(s) of {tower} are ignored: the text model does not read them"
            for tower, count in towers.items()
        ]
        return list(found.values())

    def _rows_of_whole(self, modules: list[Module]) -> None:
        """Refuse rows of a module that is trained as a whole: peft makes such an adapter, and fails to compute it."""
        paths = {module.path for module in modules if "tokens" in module.parts}
        if self.config.tie_word_embeddings and EMBEDDING in paths:
            paths.add(HEAD)
        self.problems += [
            f"rows of {module.path} are trained, and modules_to_save names it too: peft itself cannot compute that"
            for module in modules
            if module.path in paths and self.settings.is_saved(module.trained)
        ]

    def _drop_tied_rows(self, modules: list[Module]) -> None:
        """Rows of a tied head are those of the table, unless others were asked for: a copy beside them is not read."""
        heads = [module for module in modules if module.path == HEAD and "tokens" in module.parts]
        table = any(module.path == EMBEDDING and "tokens" in module.parts for module in modules)
        asked = self.settings.trainable_token_indices
        if table and self.config.tie_word_embeddings and not (len(asked) > 1 and len(set(asked.values())) > 1):
            for module in heads:
                del module.parts["tokens"]

    def _add(self, module: Module, named: Named) -> None:
        if named.part in module.parts or named.trained != module.trained:
            other = module.parts.get(named.part)
            beside = other.name if other else module.trained
            self.problems.append(f"twice: {named.stored} and {beside} are of one module, {module.path}")
        module.parts[named.part] = AdapterTensor(self.file, named.stored)

    def _not_finite(self) -> list[str]:
        problems = []
        for name, entry in self.file.entries.items():
            if not readable(entry.dtype) or 0 in entry.shape or not entry.shape:
                continue
            step = max(1, CHECKED_BYTES * entry.shape[0] // max(1, 4 * int(np.prod(entry.shape))))
            for start in range(0, entry.shape[0], step):
                block = self.file.rows(name, start, min(start + step, entry.shape[0]))
                if not np.isfinite(block).all():
                    what = "NaN" if np.isnan(block).any() else "infinity"
                    problems.append(f"{name} holds {what}")
                    break
        return problems

    def _one(self, module: Module) -> None:
        """The update of one module."""
        name = f"{module.path}.weight"
        base = module.parts.get("base")
        plain = module.parts.get("weight")
        update, problems = read_module(module, self.shapes[name], self.settings)
        self.problems += problems
        if plain is not None and update is not None:
            self.problems.append(f"{plain.name} replaces {name}, to which other tensors of the file are added")
        whole = name in (EMBEDDING_WEIGHT, HEAD_WEIGHT)
        if plain is not None and whole and not self.settings.is_saved(module.trained):
            base = base or plain  # loaded into the base model itself, not put in its place
        elif plain is not None:
            update = Replaced(plain)
        for stored in (base, plain):
            if stored is not None:
                self._fits(stored, name, resizable=whole)
        if update is not None:
            self.updates[name] = update
        if base is not None and whole:
            self.bases[name] = base
        elif base is not None and update is None:
            self.updates[name] = Replaced(base)
        elif base is not None:
            self.problems.append(f"{base.name}: the base of an adapted linear is not taken from an adapter")

    def _fits(self, stored: AdapterTensor, name: str, *, resizable: bool) -> None:
        shape, expected = stored.entry.shape, self.shapes[name]
        if shape == expected or (resizable and len(shape) == 2 and shape[1] == expected[1] and shape[0] > 0):
            return
        self.problems.append(f"wrong shape: {stored.name} is {list(shape)}, {name} is {list(expected)}")

    def rows_of(self, name: str) -> int:
        """Rows of table or head once the adapter's own stands in its place."""
        update = self.updates.get(name)
        if isinstance(update, Replaced):
            return update.stored.entry.shape[0]
        tied = self.config.tie_word_embeddings
        base = self.bases.get(name) or (
            self.bases.get(EMBEDDING_WEIGHT) or self.bases.get(HEAD_WEIGHT) if tied else None
        )
        return base.entry.shape[0] if base else self.config.vocab_size

    def _vocabulary(self) -> None:
        """Table, head, and what is added to them have one number of tokens."""
        table, head = self.rows_of(EMBEDDING_WEIGHT), self.rows_of(HEAD_WEIGHT)
        for name, rows in ((EMBEDDING_WEIGHT, table), (HEAD_WEIGHT, head)):
            update = self.updates.get(name)
            if isinstance(update, LowRank) and update.shape[0] != rows:
                self.problems.append(
                    f"{update.second.name} is of {update.shape[0]} tokens, the model has {rows}, and the file holds no "
                    "table of its own: save it with save_embedding_layers=True, or list it in modules_to_save"
                )
        if table != head:
            self.problems.append(
                f"the token table has {table} rows and the head {head}: save both (modules_to_save) where the "
                "vocabulary is resized"
            )

    def _rows_in_reach(self) -> None:
        for name, update in self.updates.items():
            if isinstance(update, TokenRows) and max(update.indices, default=0) >= self.rows_of(name):
                self.problems.append(
                    f"{update.stored.name}: row {max(update.indices)} is trained, {name} has {self.rows_of(name)}, and "
                    "the file holds no larger table (save_embedding_layers=True)"
                )

    def _absent(self, modules: list[Module]) -> None:
        """What the settings name and the file does not hold."""
        for name in self.settings.modules_to_save:
            tied_head = self.settings.ensure_weight_tying and HEAD.endswith(name)
            if not tied_head and not any(is_in(module.trained, name) for module in modules):
                self.problems.append(f"modules_to_save names {name!r}, and the file holds no such module")
        trained = [module for module in modules if "tokens" in module.parts]
        for name in self.settings.trainable_token_indices:
            from_table = self.config.tie_word_embeddings and name != "" and HEAD.endswith(name) and bool(trained)
            if not from_table and not any(is_named(module, name) for module in trained):
                self.problems.append(f"trainable_token_indices is set, and the file has none of {name or EMBEDDING}")

    def _tied(self, modules: list[Module]) -> None:
        """What peft's model does to a head that is the token table."""
        settings = self.settings
        if len(self.bases) == 2 and not equal(*self.bases.values()):
            one, other = self.bases.values()
            self.problems.append(f"{one.name} and {other.name} differ, and config.json ties table and head")
        table, head = self.updates.get(EMBEDDING_WEIGHT), self.updates.get(HEAD_WEIGHT)
        if isinstance(table, TokenRows) and head is None:
            self.updates[HEAD_WEIGHT] = table
        elif isinstance(table, TokenRows) and isinstance(head, LowRank) and head.magnitude is not None:
            self.problems.append(
                "rows of table and head are trained, and the head has a magnitude (DoRA): peft itself cannot compute it"
            )
        elif settings.ensure_weight_tying and isinstance(table, Replaced):
            self.updates[HEAD_WEIGHT] = table
        elif settings.ensure_weight_tying and isinstance(table, LowRank) and table.magnitude is not None:
            if head is None:  # its rows have lengths of their own, where the table's channels have
                self.problems.append(
                    "half of a pair: use_dora and ensure_weight_tying are set, and lm_head is not there"
                )
        elif settings.ensure_weight_tying and isinstance(table, LowRank):
            trained = next((module.trained for module in modules if module.path == HEAD), HEAD)
            self.updates[HEAD_WEIGHT] = replace(table, scaling=settings.scaling_of(trained, table.r))

    def _ambiguous(self, modules: list[Module]) -> None:
        """Say where two patterns match a module: saving sorts them, and the first one counts."""
        for key, patterns in (
            ("rank_pattern", self.settings.rank_pattern),
            ("alpha_pattern", self.settings.alpha_pattern),
        ):
            pairs: Counter[tuple[str, str]] = Counter()
            for module in modules:
                found = matches(patterns, module.trained)
                if len(found) > 1 and patterns[found[0]] != patterns[found[1]]:
                    pairs[found[0], found[1]] += 1
            self.notes += [
                f"{key}: {one!r} and {other!r} both match {count} module(s); the first one counts, as peft computes "
                "once the adapter is saved (it sorts them), which need not be what was trained"
                for (one, other), count in pairs.items()
            ]


def _other_base(said: str | None, config: ModelConfig, names: tuple[str, ...]) -> str | None:
    """A note where the adapter was trained on a model of another name."""
    known = [*names, str(config.raw.get("_name_or_path") or "")]
    last = [_last(name) for name in known if name]
    if not said or not last or _last(said) in last:
        return None
    return f"the adapter says that its base is {said}, and this is {known[0] or last[0]}: names and shapes fit"


def _last(path: str) -> str:
    """The model's name in a path, a name of the hub, or a path in the hub's cache."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    if "snapshots" in parts[1:]:
        return parts[parts.index("snapshots") - 1].split("--")[-1]
    return parts[-1] if parts else ""
