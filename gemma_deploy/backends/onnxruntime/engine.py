"""How artifacts of `backend.type: onnxruntime` are run: in onnxruntime-genai, or in ONNX Runtime itself.

genai is what users of these artifacts have, and comes as an extra. Where it is not installed, ONNX Runtime runs the
same graph with a cache that is written in place; tokens are then drawn by sampling.py. Both look ahead (lookup.py) in
ONNX Runtime.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.adapters import KeptAdapter, slots_of
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.keeping import adapter_named, loaded
from gemma_deploy.backends.onnxruntime.adapters import arrays_of, keep, values_of
from gemma_deploy.backends.onnxruntime.assistant import Assistant, AssistantModel, refuse_caches, sources_of
from gemma_deploy.backends.onnxruntime.genai import INSTALL, GenaiModel, GenaiSession, genai_installed, require_genai
from gemma_deploy.backends.onnxruntime.in_place import NEAR_TIE, OrtModel, OrtSequence
from gemma_deploy.errors import UsageError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.runtime.cached import CachedSession
from gemma_deploy.runtime.draft import decider_for
from gemma_deploy.runtime.engine import Engine, Limits, Session
from gemma_deploy.runtime.sampling import Sampling
from gemma_deploy.runtime.speculative import Decider, Guesser
from gemma_deploy.text import Tokenizer

if TYPE_CHECKING:
    from gemma_deploy.parity.sources import LogitSource

log = logging.getLogger(__name__)
KERNELS = ("shipped", "strict")


class OrtSession(CachedSession):
    """One sequence in ONNX Runtime, in a cache that is written in place.

    Args:
        model, tokenizer, sampling, max_length, endless, lookup: see `CachedSession`.
        draft: a smaller model that guesses ahead, or a drafter of this one.
        adapters: those that may be used, by name.
    """

    def __init__(
        self,
        model: OrtModel,
        tokenizer: Tokenizer,
        sampling: Sampling | None = None,
        *,
        draft: Decider | AssistantModel | None = None,
        adapters: Mapping[str, KeptAdapter] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        joined = draft if isinstance(draft, AssistantModel) else None
        smaller = draft if not isinstance(draft, AssistantModel) else None
        super().__init__(model, tokenizer, sampling, draft=smaller, **options)
        self.model, self._adapters = model, adapters
        self._assistant = None if joined is None else Assistant(joined, model, sampler=self._sampler)
        self.reset()

    def _new_sequence(self) -> OrtSequence:
        """For what the model computes with the adapter that is used."""
        matrices = None if self._adapter is None else self.model.adapters[self._adapter]
        self._own = OrtSequence(self.model, self.max_length, matrices)
        return self._own

    def _change_adapter(self, adapter: str | None) -> None:
        if adapter is not None and adapter not in self.model.adapters:
            kept = adapter_named(adapter, self._adapters, self.path)
            self.model.adapters[adapter] = values_of(kept, self.model.slots)
        self.cancel()
        self._ids, self._answer = self.ids, ()
        self._adapter = adapter
        self._sequence = self._new_sequence()

    def _guesser(self) -> Guesser | None:
        if self._assistant is None:
            return super()._guesser()
        self._assistant.follow(self._ids, self._own)
        return self._assistant


class OrtEngine(Engine):
    """In ONNX Runtime itself, where onnxruntime-genai is not installed."""

    runtime = "onnxruntime"
    kernel_names: Sequence[str] = KERNELS

    def __init__(self, artifact: Artifact, *, threads: int = 0) -> None:
        super().__init__(artifact, threads=threads)
        self._told = False
        self._adapters: dict[str, KeptAdapter] = {}

    def check_runtime(self) -> None:
        """See `Engine`.

        Raises:
            UsageError: an artifact for a GPU, which only genai runs.
        """
        if self.manifest.recipe.backend.dtype not in NEAR_TIE:
            require_genai(str(self.path))
        if not self._told:
            log.warning("onnxruntime-genai is not installed: ONNX Runtime itself runs this artifact (%s)", INSTALL)
        self._told = True

    @functools.cached_property
    def _graph(self) -> OrtModel:
        return OrtModel(self.path, self.manifest, self.threads)

    @property
    def limits(self) -> Limits:
        """See `Engine`: the cache grows with the sequence, and one token is left for the answer."""
        context = self.manifest.contract.context
        return Limits(context - 1, context)

    @property
    def load_seconds(self) -> float:
        """See `Engine`."""
        opened = self.__dict__.get("_graph") or self.__dict__.get("_graph_with_states")
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
        if not lookup and draft is None:
            self.check_runtime()
        return self._session(sampling, max_length=max_length, endless=endless, lookup=lookup, draft=draft)

    def _session(self, sampling: Sampling | None, *, draft: Engine | None, **options: Any) -> Session:
        """A session in ONNX Runtime."""
        guesses = None if draft is None else self._drafting(draft, lookup=options["lookup"])
        model = self._opened(states=isinstance(guesses, AssistantModel))
        session = OrtSession(model, self.tokenizer, sampling, draft=guesses, adapters=self._adapters, **options)
        give_memory_back()  # what opening took and freed: 190 MiB with a vocabulary of 262,144
        return session

    @functools.cached_property
    def _graph_with_states(self) -> OrtModel:
        """The graph that gives hidden states as well; opened where a drafter asks for them."""
        return OrtModel(self.path, self.manifest, self.threads, states=True)

    def _opened(self, *, states: bool = False) -> OrtModel:
        with self._opening:
            return self._graph_with_states if states else self._graph

    def _drafting(self, draft: Engine, *, lookup: bool) -> Decider | AssistantModel:
        """Who guesses, after a look at whether it can."""
        if isinstance(draft, AssistantEngine) and not lookup:
            return draft.model_for(self)
        return decider_for(draft, self, lookup=lookup)

    def decider(self) -> Decider:
        """See `Engine`."""
        return self._opened()

    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """See `Engine`: the graph made exact, or with the kernels it ships."""
        from gemma_deploy.backends.onnxruntime.source import DynamicSource

        kept = None if adapter is None else adapter_named(adapter, self._adapters, self.path)
        matrices = None if kept is None else arrays_of(values_of(kept, slots_of(self.artifact)))
        return DynamicSource(self.path, "strict" if kernels == "strict" else "shipped", adapter=matrices)

    def load_adapter(self, adapter: str | Path) -> str:
        """See `Engine`."""
        return loaded(self.artifact, adapter, self._adapters, keeping=keep)

    def unload_adapter(self, adapter: str) -> None:
        """See `Engine`."""
        del self._adapters[adapter]
        for opened in ("_graph", "_graph_with_states"):
            if (model := self.__dict__.get(opened)) is not None:
                model.adapters.pop(adapter, None)


class AssistantEngine(OrtEngine):
    """The artifact of a drafter: nothing but a draft."""

    def check_runtime(self) -> None:
        """See `Engine`.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "this artifact is a drafter: it guesses for another model, and makes no text of its own",
            where=str(self.path),
            expected="an artifact of a model that generates text",
            next_step=f"`gemma-deploy run TARGET --draft {self.path} -p TEXT`",
        )

    def session(
        self,
        sampling: Sampling | None = None,
        *,
        max_length: int | None = None,
        endless: bool = False,
        lookup: bool = False,
        draft: Engine | None = None,
    ) -> Session:
        """Refused, see `check_runtime`."""
        self.check_runtime()
        raise AssertionError(self.path)  # pragma: no cover

    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """Refused, see `check_runtime`."""
        self.check_runtime()
        raise AssertionError(self.path)  # pragma: no cover

    def decider(self) -> Decider:
        """Refused: it is no model by itself.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "this artifact is a drafter that reads keys, values and hidden states of a model in ONNX Runtime",
            where=f"{self.path} (--draft)",
            expected="beside a model in another runtime, an artifact of a smaller Gemma with the same tokens",
            next_step="compile the model that it guesses for with backend.type onnxruntime, or leave --draft out",
        )

    def model_for(self, target: OrtEngine) -> AssistantModel:
        """The graph, joined to the caches of the model that it guesses for.

        Raises:
            UsageError: it is another's. ArtifactError: a file is missing or damaged.
        """
        sources = sources_of(self, target)
        refuse_caches(target._opened(states=True))
        return AssistantModel(self.path, self.manifest, sources=sources, threads=self.threads)


class GenaiEngine(OrtEngine):
    """In onnxruntime-genai; what looks ahead in ONNX Runtime."""

    runtime = "onnxruntime-genai"

    def check_runtime(self) -> None:
        """See `Engine`: it is there."""

    @functools.cached_property
    def _model(self) -> GenaiModel:
        return GenaiModel(self.path, self.threads, self.manifest.contract.adapters)

    @property
    def load_seconds(self) -> float:
        """See `Engine`."""
        opened = self.__dict__.get("_model")
        return super().load_seconds + (opened.load_seconds if opened is not None else 0.0)

    def unload_adapter(self, adapter: str) -> None:
        """See `Engine`."""
        kept = self._adapters[adapter]
        super().unload_adapter(adapter)
        if "_model" in self.__dict__ and kept not in self._adapters.values():
            self._model.unload_adapter(kept)

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
        if lookup or draft is not None:
            return self._session(sampling, max_length=max_length, endless=endless, lookup=lookup, draft=draft)
        with self._opening:
            model = self._model
        length = max_length or model.context_length
        min_length = min(length, model.context_length) if endless else 0  # a stop token would end genai's generator
        session = GenaiSession(
            model, self.tokenizer, sampling, max_length=length, min_length=min_length, adapters=self._adapters
        )
        if endless:
            session.stop_ids = frozenset()
        give_memory_back()
        return session


def open_engine(artifact: Artifact, *, threads: int = 0, strict: bool = False) -> Engine:
    """An artifact in genai where that is installed, and in ONNX Runtime where it is not.

    Raises:
        UsageError: `strict`, which is for the static pair.
    """
    if strict:
        raise UsageError(
            "--strict is for static artifacts: this one is computed by the operators that its graph names",
            where=str(artifact.path),
            next_step="leave --strict out",
        )
    kind = GenaiEngine if genai_installed() else OrtEngine
    if artifact.manifest.model.drafting is not None:
        kind = AssistantEngine
    return kind(artifact, threads=threads)
