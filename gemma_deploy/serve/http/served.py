"""An artifact that is served: its tokenizer, the thread that computes it, and the way back into the event loop."""

from __future__ import annotations

import asyncio
import copy
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.engine import Engine
from gemma_deploy.serve.guiding import Grammar, Guide, Guides
from gemma_deploy.serve.http.errors import ApiError, told
from gemma_deploy.serve.http.metrics import Metrics
from gemma_deploy.serve.request import Ended, Event, Failed, Request
from gemma_deploy.serve.worker import Computing

BYTE = len("<0x00>")
MOST_SCORES = 1 << 19  # log-probabilities of one request, each some 100 bytes before it is sent
LONG = 1 << 16  # characters of a text that may be too long for any context


class Asked:
    """One text that is being computed: its events, in the event loop.

    Attributes:
        request: what was asked; started: when, in seconds of `time.perf_counter`.
    """

    def __init__(self, served: Served, request: Request) -> None:
        self.request, self.started = request, time.perf_counter()
        self._served, self._events, self._over = served, asyncio.Queue[Event](), False
        served.worker.submit(request, self)

    def put(self, event: Event) -> None:
        """An event more; called in the event loop."""
        self._events.put_nowait(event)

    async def next(self) -> Event:
        """The next event.

        Raises:
            ApiError: it failed.
        """
        event = await self._events.get()
        self._over = isinstance(event, Ended | Failed)
        if isinstance(event, Failed):
            raise told(event.error)
        return event

    def leave(self) -> None:
        """Nobody waits for it any more."""
        if not self._over:
            self._served.worker.cancel(self)


class Served:
    """See the module.

    Args:
        engine: of the artifact; worker: what computes it, here or elsewhere.
        names: under which it is asked for, its own first; add_bos: put BOS in front of token ids that have none.
        adapters: those that are loaded, by name, with the numbers that `Scheduling.load` gave.

    Attributes:
        adapters: by name, each as what is served with it; changing: held by who adds or takes away one of them.
        number: of the adapter that it is computed with, 0: with none; parent: name of the model alone, for an adapter.
    """

    number, parent = 0, ""

    def __init__(
        self,
        engine: Engine,
        worker: Computing,
        names: Sequence[str],
        *,
        add_bos: bool = False,
        adapters: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.engine, self.names, self.add_bos = engine, tuple(names), add_bos
        self.tokenizer, self.created = engine.tokenizer, int(time.time())
        self.worker = worker
        self.context, self.vocabulary, self.together = worker.context, worker.vocabulary, worker.together
        self.stop_ids = frozenset(engine.stop_ids)
        self.guides = Guides(engine.path, self.vocabulary, self.stop_ids)
        self.metrics = Metrics()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._texts: dict[int, str] = {}
        self.changing = asyncio.Lock()
        self.adapters: dict[str, Served] = {}
        for name, number in adapters.items():
            self.add_adapter(name, number)

    def add_adapter(self, name: str, number: int) -> Served:
        """An adapter more, in the place of one of that name: what is served with it, as NAME:ADAPTER.

        Args:
            number: what `Scheduling.load` gave.
        """
        made = copy.copy(self)
        made.names, made.number, made.parent = tuple(f"{one}:{name}" for one in self.names), number, self.names[0]
        made.adapters, made.metrics, made.created = {}, Metrics(), int(time.time())
        self.adapters[name] = made
        return made

    def called(self) -> Mapping[str, Served]:
        """The model and all its adapters, by all their names."""
        every = [self, *self.adapters.values()]
        return {name: one for one in every for name in one.names}

    def start(self) -> None:
        """Begin to compute; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start(self._deliver)

    def ask(self, requests: Sequence[Request], param: str) -> list[Asked]:
        """Have texts computed.

        Args:
            param: the field that the prompt came in.

        Raises:
            ApiError: one of them cannot be; then none is.
        """
        if self.worker.broken is not None:
            raise told(self.worker.broken)
        self._check_scores(requests)
        asked: list[Asked] = []
        try:
            for request in requests:
                self._check_length(request, param)
                asked.append(Asked(self, replace(request, adapter=self.number)))
        except BaseException as error:
            for one in asked:
                one.leave()
            if isinstance(error, UsageError):
                raise told(error, param) from None
            raise
        return asked

    def _check_scores(self, requests: Sequence[Request]) -> None:
        """Refuse log-probabilities that would take gigabytes."""
        asked = 0
        for one in requests:
            if one.top is not None:
                asked += min(one.max_tokens, max(0, self.context - len(one.ids))) * max(1, one.top)
            if one.prompt_top is not None:
                asked += len(one.ids) * max(1, one.prompt_top)
        if asked > MOST_SCORES:
            raise ApiError(
                400,
                f"logprobs: {asked} log-probabilities are asked for, and one request may have {MOST_SCORES}: ask for "
                "fewer tokens, texts or alternatives",
                param="logprobs",
            )

    async def guide(self, asked: tuple[Grammar, str] | None) -> Guide | None:
        """What an answer has to follow.

        Args:
            asked: a grammar, and the field that it came in.

        Raises:
            ApiError: the grammar is damaged or too costly.
        """
        if asked is None:
            return None
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.guides.readers, self.guides.guide, asked[0])
        except UsageError as error:
            raise told(error, asked[1]) from None

    def _check_length(self, request: Request, param: str) -> None:
        count = len(request.ids)
        if count + (request.max_tokens > 0) > self.context:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.context} tokens, the answer included, and the prompt "
                f"has {count}.",
                param=param,
                code="context_length_exceeded",
            )

    def _deliver(self, found: Sequence[tuple[Any, Event]]) -> None:
        """In the thread that computes."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_hand_out, found)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text with one BOS in front.

        Args:
            special: special tokens that the text spells are taken as such; else they are text like any other.

        Raises:
            UsageError: the text is no Unicode, or so long that no tokens of this model could be few enough; that is
                seen before it is divided, which holds all others up.
        """
        backend = self.tokenizer.backend  # of the event loop alone
        if len(text) > LONG and len(text) > self.context * self._longest:
            raise UsageError(
                f"the text has {len(text)} characters; this model's maximum context length is {self.context} tokens",
                expected=f"at most {self._longest} characters for each",
                next_step="send a shorter one",
            )
        backend.encode_special_tokens = not special
        try:
            ids = self.tokenizer.encode(text)
        finally:
            backend.encode_special_tokens = False
        return ids

    @functools.cached_property
    def _longest(self) -> int:
        """Characters of a text that one token stands for at most: the longest, of what normalizers make one of four."""
        return 4 * max(map(len, self.tokenizer.backend.get_vocab()), default=1)

    def text_of(self, token: int) -> str:
        r"""What one token is alone: its text, that of a special one too, `bytes:\xNN` of a part of a character."""
        found = self._texts.get(token)
        if found is None:
            piece = self.tokenizer.backend.id_to_token(token) or ""
            if len(piece) == BYTE and piece.startswith("<0x") and piece.endswith(">"):
                found = "bytes:\\x" + piece[3:5].lower()
            else:
                found = self.tokenizer.decode_all([token])
                if piece.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not found.startswith(" "):
                    found = " " + found  # which some decoders take off at the beginning
            self._texts[token] = found
        return found

    def bytes_of(self, token: int) -> list[int] | None:
        """UTF-8 of one token; None of a part of a character that nobody says."""
        text = self.text_of(token)
        if text.startswith("bytes:\\x"):
            return [int(text[-2:], 16)]
        return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())

    def card(self, name: str) -> Mapping[str, Any]:
        """Of `/v1/models`."""
        backend = self.engine.manifest.recipe.backend.type
        known = card(name, root=self.names[0], created=self.created, longest=self.context, backend=backend)
        return {**known, "texts_at_once": self.together, **({"parent": self.parent} if self.parent else {})}


def card(name: str, *, root: str, created: int, longest: int, backend: str) -> dict[str, Any]:
    """What `/v1/models` tells of any model.

    Args:
        name: under which it was asked for; root: its own; created: seconds since 1970; longest: tokens of a text.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "gemma-deploy",
        "root": root,
        "max_model_len": longest,
        "backend": backend,
    }


def _hand_out(found: Sequence[tuple[Asked, Event]]) -> None:
    for asked, event in found:
        asked.put(event)
