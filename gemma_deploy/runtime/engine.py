"""An artifact that is open, whatever back end made it: sessions that make text, with a cache each.

`Engine` and `Session` (sequence.py) hold what all back ends share; each has its own of both in its folder.
`open_engine` of gemma_deploy/engine.py picks the right one.
"""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.artifact.adapters import slots_of
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.chat import PLAIN, ChatEvent, ChatFormat, format_named, parse
from gemma_deploy.chat.messages import for_template
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.generate import GenerationStats, Prompt, check_length, encoded
from gemma_deploy.runtime.many import ManySequences, Packed
from gemma_deploy.runtime.sampling import Sampling
from gemma_deploy.runtime.sequence import Session
from gemma_deploy.runtime.staged import Chain, Stage
from gemma_deploy.text import ChatTemplate, Tokenizer

if TYPE_CHECKING:
    from gemma_deploy.parity.sources import LogitSource
    from gemma_deploy.runtime.speculative import Decider


@dataclass(frozen=True)
class Limits:
    """What an artifact can be asked.

    Args:
        prompt: tokens of the longest prompt; context: tokens there may be in all, the answer included.
        fixed: every prompt costs as much as the longest.
        rows: sequences that a decode step computes together, whatever is asked for.
        cache_bytes: of the key-value cache that every step reads, where that does not grow with the context.
    """

    prompt: int
    context: int
    fixed: bool = False
    rows: int = 1
    cache_bytes: int = 0


class Engine(ABC):
    """An artifact that is open. Graphs are opened when they are first needed, and shared by its sessions.

    Args:
        artifact: whose files have been checked; threads: of one operator, 0 for as many as there are cores.

    Attributes:
        runtime: what computes it: `onnxruntime-genai`, `onnxruntime`, or `static` for the pair of graphs that ONNX
            Runtime computes one after the other.
        kernel_names: what `source` takes; the first is what an evaluation takes unless told otherwise.
    """

    runtime: str
    kernel_names: Sequence[str]

    def __init__(self, artifact: Artifact, *, threads: int = 0) -> None:
        self.artifact, self.threads = artifact, threads
        self._opening = threading.Lock()  # graphs are opened once, whoever asks first

    @property
    def path(self) -> Path:
        """The directory of the artifact."""
        return self.artifact.path

    @property
    def manifest(self) -> Manifest:
        """The manifest of the artifact."""
        return self.artifact.manifest

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the artifact.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        return Tokenizer(self.path)

    @property
    def template(self) -> ChatTemplate:
        """The chat template, or one that refuses everything where the model has none.

        Raises:
            ArtifactError: its file is damaged.
        """
        return self.tokenizer.chat

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How the model marks its thinking and its tool calls: as recorded, or as its chat template tells.

        Raises:
            ArtifactError: a file of the tokenizer is missing or damaged.
        """
        name = self.manifest.chat_format
        return format_named(name) if name is not None else self.tokenizer.chat_format() or PLAIN

    @functools.cached_property
    def markers(self) -> Mapping[int, str]:
        """Special tokens that a parser of replies needs to see, with their text: `shown` of `Session.reply`."""
        return self.tokenizer.tokens_of(self.chat_format.markers)

    @property
    def vocab_size(self) -> int:
        """V: logits of a token."""
        return self.manifest.contract.vocab_size

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self.manifest.model.eos_token_ids

    @abstractmethod
    def check_runtime(self) -> None:
        """See that what computes it is installed, and say so where it is not what is usual; `session` does.

        Raises:
            UsageError: it is not.
        """

    @property
    def level(self) -> str:
        """The level of CPU features that its kernels are of; "" where they are not this program's own.

        Raises:
            UsageError: what computes it is not installed, or a level is asked for that this processor lacks.
        """
        return ""

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """What can be asked of it."""

    @property
    @abstractmethod
    def load_seconds(self) -> float:
        """What opening its graphs took, those that were needed so far."""

    @property
    def apart_bytes(self) -> int:
        """Peak RSS of a process of its own that computes it; 0 where this one does."""
        return 0

    @abstractmethod
    def session(
        self,
        sampling: Sampling | None = None,
        *,
        max_length: int | None = None,
        endless: bool = False,
        lookup: bool = False,
        draft: Engine | None = None,
    ) -> Session:
        """A sequence of its own.

        Args:
            sampling: how tokens are chosen; greedy by default.
            max_length: tokens there will be in all, at most; where a cache grows with that, it is made for as many.
            endless: no stop token ends a reply: for measuring.
            lookup: guess ahead where the text repeats itself; greedy only.
            draft: a smaller model of the same vocabulary that guesses ahead. It changes the speed alone: greedy text is
                the same, and what is drawn has the same distribution.

        Raises:
            UsageError: this back end does not look ahead, or not with this sampling or this draft.
            ArtifactError: a graph is missing or damaged.
        """

    def many(self, cache_bytes: int) -> ManySequences | None:
        """The model opened for many sequences at once; None where one step computes one of them.

        Args:
            cache_bytes: of all sequences' keys and values together, at most.

        Raises:
            UsageError: what computes it is not installed. ArtifactError: a file is missing or damaged.
        """
        return None

    @property
    def stages(self) -> Sequence[str]:
        """Stages that the artifact is divided into by layers, in their order; none where it is not."""
        return ()

    def stage(self, name: str) -> Stage:
        """One of `stages`, opened in this process.

        Raises:
            ArtifactError: a file of it is missing or damaged.
        """
        raise AssertionError(name)  # pragma: no cover: a back end that has stages opens them

    def across(self, chain: Chain) -> Engine:
        """The same artifact, whose stages a chain computes elsewhere; no graph is opened here."""
        raise AssertionError(chain)  # pragma: no cover: see `stage`

    def packed_adapter(self, adapter: str | Path) -> Packed:
        """An adapter as what `many` gives takes it; nothing is written. Any thread may ask.

        Args:
            adapter: as `load_adapter` takes it.

        Raises:
            UsageError, ArtifactError, CheckpointError, NotBuiltError: see `load_adapter`.
        """
        slots_of(self.artifact)
        raise AssertionError(adapter)  # pragma: no cover: who computes many sequences has its own

    def decider(self) -> Decider:
        """The model itself, opened, that may guess for another one.

        Raises:
            UsageError: it cannot. ArtifactError: a graph is missing or damaged.
        """
        raise UsageError(
            "a static artifact cannot guess for another: its decode graph takes one token",
            where=f"{self.path} (--draft)",
            expected="an artifact of backend.type onnxruntime or native",
            next_step="compile the draft for onnxruntime or native, or leave --draft out",
        )

    @abstractmethod
    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """Logits at every position of many prompts, for comparisons; computed apart from all sessions.

        Args:
            kernels: one of `kernel_names`, None for the first of them; `strict` computes what the weights stand for.
            adapter: what `load_adapter` gave; None: with none.

        Raises:
            UsageError: there are no such kernels, or no adapter of that name is loaded.
        """

    def load_adapter(self, adapter: str | Path) -> str:
        """Make an adapter ready for sessions; the model stays open.

        Args:
            adapter: name of one that the artifact keeps (`gemma-deploy adapter`), or a directory that peft wrote, which
                is kept on the way.

        Returns:
            The name that `Session.use` takes.

        Raises:
            UsageError: the artifact takes no adapters, there is none of that name, or it cannot be loaded beside an
                artifact. ArtifactError: its file has changed. CheckpointError: the directory is damaged, or is of
                another model.
        """
        slots_of(self.artifact)  # says what an artifact without them needs
        raise AssertionError(adapter)  # pragma: no cover: a back end that has slots loads them

    def unload_adapter(self, adapter: str) -> None:
        """Forget an adapter, and give its memory back; no session may use it any more.

        Args:
            adapter: what `load_adapter` gave.
        """
        raise AssertionError(adapter)  # pragma: no cover: a back end that loads them forgets them

    def stream(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        lookup: bool = False,
        draft: Engine | None = None,
        adapter: str | None = None,
        shown: Mapping[int, str] | None = None,
        stats: GenerationStats | None = None,
    ) -> Iterator[str]:
        """What the model says to one prompt, in a session for that alone; see `Session.reply`.

        Args:
            prompt: a text to continue, chat messages to answer, or token ids as they are.
            lookup, draft: see `session`.
            adapter: what `load_adapter` gave; None: with none.

        Raises:
            UsageError, ArtifactError: see `session` and `Session.reply`; at once, before the first piece.
        """
        check_length(max_new_tokens)
        ids = encoded(self.tokenizer, prompt)
        session = self.session(sampling, max_length=len(ids) + max_new_tokens, lookup=lookup, draft=draft)
        session.use(adapter)
        stats = stats if stats is not None else GenerationStats()
        stats.load_seconds = self._loaded_for_stream()
        return session.reply(ids, max_new_tokens=max_new_tokens, stop=stop, shown=shown, stats=stats)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        names: Mapping[str, Any] | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        lookup: bool = False,
        draft: Engine | None = None,
        adapter: str | None = None,
        stats: GenerationStats | None = None,
    ) -> Iterator[ChatEvent]:
        """What the model answers to messages, as text, thinking and tool calls; the rest as `stream`.

        Args:
            messages: as the OpenAI API has them, oldest first: of the system, the user, the assistant (its `tool_calls`
                and `reasoning_content` too), and results of tools.
            tools: JSON schemas of functions that the model may call; names: more for the chat template, such as
                `enable_thinking`.
            stop: looked for in thinking and tool calls too.

        Raises:
            UsageError: the chat template refuses the messages, or one holds arguments that are no JSON object.
                Others as `stream`; all at once, before the first event.
        """
        taken = for_template(messages, self.template.source(tools=tools is not None))
        prompt = self.tokenizer.render_chat(taken, tools=tools, names=names)
        pieces = self.stream(
            self.tokenizer.encode(prompt),
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop=stop,
            lookup=lookup,
            draft=draft,
            adapter=adapter,
            shown=self.markers,
            stats=stats,
        )
        return parse(self.chat_format, pieces, prompt)

    def _loaded_for_stream(self) -> float:
        """Of `stats.load_seconds`, what is spent before the first step."""
        return self.load_seconds
