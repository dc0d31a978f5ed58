"""How artifacts of `backend.type: native` are run: in the library, through its C ABI."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import CACHE_BYTES, Model, level_here, library_path
from gemma_deploy.names import PARAMS
from gemma_deploy.runtime.cached import CachedSession
from gemma_deploy.runtime.draft import decider_for
from gemma_deploy.runtime.engine import Engine, Limits, Session
from gemma_deploy.runtime.many import ManySequences, Packed
from gemma_deploy.runtime.sampling import Largest, Rows, Sampling
from gemma_deploy.runtime.speculative import Reader
from gemma_deploy.text import Tokenizer

if TYPE_CHECKING:
    from gemma_deploy.artifact.adapters import KeptAdapter
    from gemma_deploy.parity.sources import LogitSource

KERNELS = ("shipped", "strict")
MOST_TOKENS = 16  # in a step of those that look ahead: 16 take 3.9 times as long as one, 8 take 2.3
SPARE = 8  # logits behind the largest that are wanted, which tell whether equals are left out
MOST_RANKED = 1024  # kMostRanked of src/ranking.h


class NativeSequence:
    """One sequence in the library; it may be set back by as many tokens as a step reads.

    Logits that it gives are its own memory: they are there until it reads on.
    """

    def __init__(self, model: Model, adapter: int = 0) -> None:
        self._model, self._number, self._length = model, model.sequence(adapter=adapter), 0
        self._logits = model.room(0)

    def __del__(self) -> None:
        if getattr(self, "_number", 0):
            self._model.drop(self._number)

    @property
    def length(self) -> int:
        """Tokens that count."""
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        if length != self._length:
            self._model.rewind(self._number, length)
        self._length = length

    def ahead(self, wanted: int) -> int:
        """All: a window keeps a page more than it sees."""
        return wanted

    def read(self, tokens: Sequence[int], top: int = 0) -> Rows:
        """Read any number of tokens: [1, V] logits of the last, or the largest `top` of them and some more."""
        return self._computed(tokens, 1, top)

    def feed(self, tokens: Sequence[int], top: int = 0) -> Rows:
        """Read a few tokens: [tokens, V] logits, or the largest, each with the bits that it has alone."""
        return self._computed(tokens, len(tokens), top)

    def _computed(self, tokens: Sequence[int], wanted: int, top: int) -> Rows:
        if top and top + SPARE <= min(MOST_RANKED, self._model.vocabulary):
            if (rows := self._ranked(tokens, wanted, top)) is not None:
                return rows
            self.length -= wanted  # computed again
            tokens = tokens[-wanted:]
        return self._whole(tokens, wanted)

    def _ranked(self, tokens: Sequence[int], wanted: int, top: int) -> list[Largest] | None:
        """The largest logits of the last tokens; None where they do not tell everything that is wanted.

        That is where the last of them has too many equals, and where a logit is no finite number.
        """
        found = self._model.ranked([(self._number, tokens, wanted)], top=top + SPARE)
        self._length += len(tokens)
        if not np.isfinite(found.log_sums).all():
            return None
        if top > 1 and (found.logits[:, top - 1] == found.logits[:, -1]).any():  # of the largest the first counts
            return None
        return [Largest(*row) for row in zip(found.ids, found.logits, found.log_sums.tolist(), strict=True)]

    def _whole(self, tokens: Sequence[int], wanted: int) -> np.ndarray:
        if len(self._logits) < wanted:
            self._logits = self._model.room(wanted)
        logits = self._model.logits([(self._number, tokens, wanted)], self._logits)
        self._length += len(tokens)
        return logits


class NativeModel:
    """An artifact's model in the library; see `Decider`."""

    near_tie = 0.0  # a token has the same logits in any company
    most_tokens = MOST_TOKENS

    def __init__(self, path: Path, stop_ids: Collection[int], threads: int) -> None:
        started = time.perf_counter()
        self.path, self.stop_ids = path.resolve(), frozenset(stop_ids)
        self._plan = plan_in(self.path)
        self.library = Model(self._plan, self.path / PARAMS, threads=threads)
        self._adapters: dict[KeptAdapter, int] = {}
        self.context_length, self.vocab_size = self.library.context, self.library.vocabulary
        self.load_seconds = time.perf_counter() - started

    def sequence(self, room: int, adapter: int = 0) -> NativeSequence:
        """A new one; pages are taken as it grows. `adapter`: what `number_of` gives."""
        return NativeSequence(self.library, adapter)

    def number_of(self, kept: KeptAdapter, manifest: Manifest) -> int:
        """An adapter's number in the library, which loads it where it has not.

        Raises:
            ArtifactError: its file has changed, or does not fit the artifact.
        """
        from gemma_deploy.backends.native.adapters import form_of, packed, read_kept

        if kept not in self._adapters:
            matrices = read_kept(kept, manifest.contract.adapters)
            self._adapters[kept] = self.library.load_adapter(*packed(matrices, self._plan, form_of(manifest)))
        return self._adapters[kept]

    def forget(self, kept: KeptAdapter) -> None:
        """Have the library forget an adapter, where it has it."""
        if (number := self._adapters.pop(kept, 0)) != 0:
            self.library.drop_adapter(number)


class NativeSession(CachedSession):
    """One sequence in the library.

    Args:
        manifest: of the artifact; adapters: those that may be used, by name.
    """

    def __init__(
        self,
        model: NativeModel,
        tokenizer: Tokenizer,
        sampling: Sampling | None = None,
        *,
        manifest: Manifest,
        adapters: Mapping[str, KeptAdapter] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, sampling, **options)
        self._model, self._manifest, self._adapters, self._number = model, manifest, adapters, 0
        self.reset()

    def _new_sequence(self) -> Reader:
        return self._model.sequence(self.max_length, self._number)

    def _change_adapter(self, adapter: str | None) -> None:
        from gemma_deploy.backends.keeping import adapter_named

        kept = None if adapter is None else adapter_named(adapter, self._adapters, self.path)
        self._number = 0 if kept is None else self._model.number_of(kept, self._manifest)
        self.cancel()
        self._ids, self._answer = self.ids, ()
        self._adapter = adapter
        self._sequence = self._new_sequence()


class NativeEngine(Engine):
    """An artifact in the library."""

    runtime = "native"
    kernel_names: Sequence[str] = KERNELS

    def __init__(self, artifact: Artifact, *, threads: int = 0) -> None:
        super().__init__(artifact, threads=threads)
        self._adapters: dict[str, KeptAdapter] = {}

    def check_runtime(self) -> None:
        """See `Engine`."""
        library_path()

    @property
    def level(self) -> str:
        """See `Engine`."""
        return level_here()

    @functools.cached_property
    def _opened(self) -> NativeModel:
        return NativeModel(self.path, self.stop_ids, self.threads)

    @property
    def limits(self) -> Limits:
        """See `Engine`: the cache grows with the sequence, and one token is left for the answer."""
        context = self.manifest.contract.context
        return Limits(context - 1, context)

    @property
    def load_seconds(self) -> float:
        """See `Engine`."""
        opened = self.__dict__.get("_opened")
        return opened.load_seconds if opened is not None else 0.0

    def session(
        self,
        sampling: Sampling | None = None,
        *,
        max_length: int | None = None,
        endless: bool = False,
        lookup: bool = False,
        draft: Engine | None = None,
    ) -> Session:
        """See `Engine`."""
        smaller = None if draft is None else decider_for(draft, self, lookup=lookup)
        return NativeSession(
            self.decider(),
            self.tokenizer,
            sampling,
            max_length=max_length,
            endless=endless,
            lookup=lookup,
            draft=smaller,
            manifest=self.manifest,
            adapters=self._adapters,
        )

    def decider(self) -> NativeModel:
        """See `Engine`."""
        with self._opening:
            return self._opened

    def many(self, cache_bytes: int = CACHE_BYTES) -> ManySequences:
        """See `Engine`."""
        return Model(plan_in(self.path), self.path / PARAMS, threads=self.threads, cache_bytes=cache_bytes)

    def packed_adapter(self, adapter: str | Path) -> Packed:
        """See `Engine`."""
        from gemma_deploy.backends.native.adapters import form_of, matrices_of, packed

        return packed(matrices_of(self.artifact, adapter), plan_in(self.path), form_of(self.manifest))

    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """See `Engine`."""
        from gemma_deploy.backends.keeping import adapter_named
        from gemma_deploy.backends.native.adapters import form_of, read_kept
        from gemma_deploy.backends.native.source import Kernels, NativeSource

        kept = None if adapter is None else adapter_named(adapter, self._adapters, self.path)
        matrices = None if kept is None else read_kept(kept, self.manifest.contract.adapters)
        chosen: Kernels = "strict" if kernels == "strict" else "shipped"
        return NativeSource(self.path, chosen, threads=self.threads, adapter=matrices, form=form_of(self.manifest))

    def load_adapter(self, adapter: str | Path) -> str:
        """See `Engine`."""
        from gemma_deploy.backends.keeping import loaded
        from gemma_deploy.backends.native.adapters import keep

        return loaded(self.artifact, adapter, self._adapters, keeping=keep)

    def unload_adapter(self, adapter: str) -> None:
        """See `Engine`."""
        kept, opened = self._adapters.pop(adapter), self.__dict__.get("_opened")
        if opened is not None and kept not in self._adapters.values():
            opened.forget(kept)
