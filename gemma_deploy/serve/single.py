"""Artifacts whose back end computes one text at a time, behind the same interface: `OneByOne`."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma_deploy.errors import DeployError
from gemma_deploy.runtime.engine import Engine, Session
from gemma_deploy.serve.adapting import Adapters
from gemma_deploy.serve.choosing import Chooser
from gemma_deploy.serve.request import (
    Began,
    Counts,
    Ended,
    Event,
    Events,
    Failed,
    Prepared,
    QueueFullError,
    Request,
    Said,
    Scores,
    check_request,
)


class OneByOne:
    """See the module; `Scheduling` says what the methods do.

    Args:
        engine: of any back end; queue: requests that wait, at most; context: as `Scheduler`.
    """

    together = 1

    def __init__(self, engine: Engine, *, queue: int = 256, context: int = 0) -> None:
        limits = engine.limits
        self.context = min(context or limits.context, limits.context)
        self.vocabulary, self._longest = engine.vocab_size, limits.prompt
        self._engine, self._queue, self._next = engine, queue, 1
        self._waiting: deque[tuple[int, Request]] = deque()
        self._cancelled: set[int] = set()
        self._run: _Run | None = None
        self._counts = Counts()
        self._adapters, self._loaded = Adapters(self._forget), dict[int, str]()  # number -> its name in the engine

    @property
    def idle(self) -> bool:
        """See `Scheduling`."""
        return self._run is None and not self._waiting

    def add(self, request: Request) -> int:
        """See `Scheduling`."""
        check_request(request, self.context, self.vocabulary)
        check_request(replace(request, max_tokens=0), self._longest, self.vocabulary)
        if len(self._waiting) >= self._queue + (self._run is None):
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting already", next_step="send it again in a moment"
            )
        self._adapters.take(request.adapter)
        number = self._number()
        self._waiting.append((number, request))
        return number

    def _number(self) -> int:
        number, self._next = self._next, self._next + 1
        return number

    def prepare(self, adapter: str | Path) -> Prepared:
        """See `Scheduling`; a directory is kept in the artifact on the way."""
        return self._engine.load_adapter(adapter)

    def load(self, prepared: Prepared) -> int:
        """See `Scheduling`."""
        assert isinstance(prepared, str)
        self._adapters.refuse_more()
        number = self._number()
        self._loaded[number] = prepared
        self._adapters.add(number)
        return number

    def unload(self, adapter: int) -> None:
        """See `Scheduling`."""
        self._adapters.unload(adapter)

    def _forget(self, adapter: int) -> None:
        name = self._loaded.pop(adapter)
        if name not in self._loaded.values():
            self._engine.unload_adapter(name)

    def cancel(self, number: int) -> None:
        """See `Scheduling`."""
        self._cancelled.add(number)

    def counts(self) -> Counts:
        """See `Scheduling`."""
        return replace(
            self._counts, running=int(self._run is not None), waiting=len(self._waiting), adapters=len(self._adapters)
        )

    def close(self) -> None:
        """See `Scheduling`."""
        self._run = None
        self._waiting.clear()

    def step(self) -> Events:
        """See `Scheduling`."""
        events: Events = []
        for number, request in list(self._waiting):
            if number in self._cancelled:
                self._waiting.remove((number, request))
                self._adapters.give_back(request.adapter)
                events.append((number, Ended("cancelled")))
        if self._run is not None and self._run.number in self._cancelled:
            self._end(Ended("cancelled"), events)
        self._cancelled.clear()
        if self._run is None and self._waiting:
            number, request = self._waiting.popleft()
            self._run = _Run(number, request, self.context)
        if self._run is not None:
            try:
                self._go_on(self._run, events)
            except DeployError as error:
                self._end(Failed(error), events)
        return events

    def _go_on(self, run: _Run, events: Events) -> None:
        """Read the prompt, or the newest token."""
        first = run.session is None
        if first:
            run.session = self._engine.session(max_length=min(self.context, len(run.request.ids) + run.most + 1))
            run.session.use(self._loaded.get(run.request.adapter))
            logits = run.read_prompt()
            self._count(prompt_tokens=len(run.request.ids))
            events.append((run.number, Began(0, run.scores, run.begun)))
        else:
            assert run.session is not None
            logits = run.session.read([run.newest])
        self._count(steps=1)
        if run.said == run.most:
            self._end(Ended("length"), events)
            return
        token = run.chooser.choose(logits, _best(logits))
        top = run.request.top
        scores = None if top is None else _scores(logits, token, top)
        if token in run.request.stop_ids:
            self._end(Ended("stop", token, scores), events)
            return
        events.append((run.number, Said(token, scores)))
        self._count(tokens=1)
        run.chooser.said(token)
        run.newest, run.said = token, run.said + 1
        if run.said == run.most:
            self._end(Ended("length"), events)

    def _end(self, event: Event, events: Events) -> None:
        assert self._run is not None
        events.append((self._run.number, event))
        adapter, self._run.session = self._run.request.adapter, None  # which is gone before its adapter
        self._run = None
        self._adapters.give_back(adapter)

    def _count(self, prompt_tokens: int = 0, tokens: int = 0, steps: int = 0) -> None:
        old = self._counts
        self._counts = replace(
            old,
            prompt_tokens=old.prompt_tokens + prompt_tokens,
            tokens=old.tokens + tokens,
            steps=old.steps + steps,
        )


class _Run:
    """The request that is being answered."""

    def __init__(self, number: int, request: Request, context: int) -> None:
        self.number, self.request = number, request
        self.most = min(request.max_tokens, context - len(request.ids))
        self.chooser = Chooser(request.choice, request.ids, request.stop_ids, guide=request.guide)
        self.session: Session | None = None
        self.scores: Scores | None = None
        self.newest = self.said = 0
        self.begun = time.perf_counter()

    def read_prompt(self) -> np.ndarray:
        """Logits of what follows it; token by token where their scores are asked for."""
        assert self.session is not None
        ids, top = list(self.request.ids), self.request.prompt_top
        if top is None:
            return self.session.read(ids)
        self.scores = Scores.empty(len(ids), top)
        logits = self.session.read(ids[:1])
        for place, token in enumerate(ids[1:], 1):
            self.scores.put(place, _scores(logits, token, top))
            logits = self.session.read([token])
        return logits


def _best(logits: np.ndarray) -> int:
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        raise DeployError(
            f"the model gave {logits[token]} as its largest logit", next_step="run `gemma-deploy parity` on it"
        )
    return token


def _scores(logits: np.ndarray, token: int, top: int) -> Scores:
    """Of one token, from [V] float32."""
    exact = logits.astype(np.float64)
    largest = exact[_best(logits)]
    found = (exact - (largest + np.log(np.exp(exact - largest).sum()))).astype(np.float32)
    order = np.lexsort((np.arange(len(logits)), -logits))[:top] if top else np.zeros(0, np.int64)
    return Scores(found[token : token + 1], order[None].astype(np.int32), found[order][None])
