"""Many texts at once on a model that computes many sequences in a step: `Scheduler`.

Every step takes the newest token of each text that is being said, and pages of prompts beside them, one prompt after
the other in turns. No more than `BESIDE` of prompts' tokens go with others' newest ones, so that a long prompt holds
nobody up for longer than a page takes. Whatever the company, what a token gives has the same bits.

Each text is computed with an adapter of its own, or with none; nothing that was computed with one is taken over by
another.

Where memory for keys and values is out, beginnings that nobody uses go first, and then the newest text, which is read
again when another has ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from gemma_deploy.errors import ChangedError, DeployError
from gemma_deploy.runtime.many import PAGE, ManySequences, NoRoomError, Packed, Ranked
from gemma_deploy.serve.adapting import Adapters
from gemma_deploy.serve.prefixes import Prefixes, common
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
from gemma_deploy.serve.runs import Piece, Run

ALONE = 256  # tokens of prompts in a step where nothing is being said: what the library computes in one pass
BESIDE = PAGE  # and beside others' newest tokens
WORTH_WAITING = 32  # tokens that another text is reading already; a page is waited for at most
HEAD_ROWS = 16  # whose logits are there at once


class Scheduler:
    """See the module; `Scheduling` says what the methods do.

    Args:
        together: texts that are computed in a step; queue: requests that wait beyond these, at most.
        context: positions of a text, at most as many as the model has; 0 for these.
        packed: reads an adapter; without it there are none.
    """

    def __init__(
        self,
        model: ManySequences,
        *,
        together: int = 16,
        queue: int = 256,
        context: int = 0,
        packed: Callable[[str | Path], Packed] | None = None,
    ) -> None:
        self._packed, self._adapters = packed, Adapters(self._forget)
        self._model, self.together, self._queue = model, together, queue
        self.context = min(context or model.context, model.context)
        self.vocabulary = model.vocabulary
        self._prefixes = Prefixes(model)
        self._running: deque[Run] = deque()  # the next whose prompt is read first
        self._waiting: deque[Run] = deque()
        self._cancelled: set[int] = set()
        self._next = 1
        self._places, self._calm = together, 0  # fewer where memory was out, until as many texts have ended since
        self._room = model.room(max(HEAD_ROWS, together))
        self._prompt_tokens = self._tokens = self._cached = self._steps = self._preempted = 0

    @property
    def idle(self) -> bool:
        """See `Scheduling`."""
        return not self._running and not self._waiting

    def counts(self) -> Counts:
        """See `Scheduling`."""
        return Counts(
            running=len(self._running), waiting=len(self._waiting), prompt_tokens=self._prompt_tokens,
            tokens=self._tokens, cached_tokens=self._cached, steps=self._steps, preempted=self._preempted,
            cache_bytes=self._model.cache_used(), kept=len(self._prefixes), held=self._model.held(),
            adapters=len(self._adapters),
        )  # fmt: skip

    def add(self, request: Request) -> int:
        """See `Scheduling`."""
        check_request(request, self.context, self.vocabulary)
        if len(self._waiting) >= self._queue + max(0, self.together - len(self._running)):
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting already", next_step="send it again in a moment"
            )
        run = Run(self._next, request, self.context)
        self._adapters.take(run.adapter)
        self._next += 1
        self._waiting.append(run)
        return run.number

    def prepare(self, adapter: str | Path) -> Prepared:
        """See `Scheduling`."""
        assert self._packed is not None
        return self._packed(adapter)

    def load(self, prepared: Prepared) -> int:
        """See `Scheduling`."""
        assert not isinstance(prepared, str)
        self._adapters.refuse_more()
        number = self._model.load_adapter(*prepared)
        self._adapters.add(number)
        return number

    def unload(self, adapter: int) -> None:
        """See `Scheduling`."""
        self._adapters.unload(adapter)

    def _forget(self, adapter: int) -> None:
        self._prefixes.forget(adapter)
        self._model.drop_adapter(adapter)

    def cancel(self, number: int) -> None:
        """See `Scheduling`."""
        self._cancelled.add(number)

    def close(self) -> None:
        """See `Scheduling`."""
        self._running.clear()
        self._waiting.clear()
        self._model.close()

    def step(self) -> Events:
        """See `Scheduling`."""
        events: Events = []
        self._drop_cancelled(events)
        self._begin()
        pieces = self._planned()
        try:
            found = self._computed(pieces, events)
        except ChangedError:
            raise
        except DeployError as error:  # of nobody in particular
            for piece in pieces:
                self._end(piece.run, Failed(error), events)
            return events
        if not len(pieces):
            return events
        self._steps += 1
        self._take(pieces, found, events)
        return events

    def _drop_cancelled(self, events: Events) -> None:
        if not self._cancelled:
            return
        for run in [*self._running, *self._waiting]:
            if run.number in self._cancelled:
                self._end(run, Ended("cancelled"), events)
        self._cancelled.clear()

    def _begin(self) -> None:
        """Give places to those that wait, the first first, but for those whose beginning is being computed already."""
        later: list[Run] = []
        while self._waiting and len(self._running) < self._places and len(later) < self.together:
            run = self._waiting.popleft()
            if self._is_coming(run):
                later.append(run)
                continue
            hit = self._prefixes.find(run.ids[: run.length], self._scores_wanted(run), adapter=run.adapter)
            run.sequence = hit.sequence or self._model.sequence(adapter=run.adapter)
            run.read, run.begun = hit.length, run.begun or time.perf_counter()
            if not run.began:
                run.cached = hit.length
            if hit.scores is not None and run.scores is not None:
                known = min(hit.scored, run.prompt)
                run.scores.put(0, hit.scores.part(0, known))
                run.scored = max(run.scored, known)
            self._running.append(run)
        self._waiting.extendleft(reversed(later))

    @staticmethod
    def _scores_wanted(run: Run) -> int | None:
        return run.request.prompt_top if run.scores is not None and run.scored < run.prompt else None

    def _is_coming(self, run: Run) -> bool:
        """Whether a text that is being read will soon leave much more of this one's beginning than is known.

        What they have in common is kept with the page that it ends in, or with the other's prompt.
        """
        reading = [one for one in self._running if one.read < one.prompt and one.adapter == run.adapter]
        if not reading:
            return False
        ids = run.ids[: run.prompt]
        known = self._prefixes.length(ids, adapter=run.adapter)
        for one in reading:
            alike = common(one.ids[: one.prompt], ids)
            if one.read < min(-(-alike // PAGE) * PAGE, one.prompt) and alike >= known + WORTH_WAITING:
                return True
        return False

    def _planned(self) -> list[Piece]:
        speaking = [run for run in self._running if run.speaks]
        pieces = [Piece(run, 1, run.wanted(1)) for run in speaking]
        budget = BESIDE if speaking else ALONE
        for run in [run for run in self._running if not run.speaks]:
            if budget <= 0:
                break
            count = min(budget, run.length - run.read, PAGE - run.read % PAGE)
            pieces.append(Piece(run, count, run.wanted(count)))
            budget -= count
            self._running.remove(run)  # the others come first in the next step
            self._running.append(run)
        return sorted(pieces, key=lambda piece: piece.run.adapter)  # rows that read one adapter beside each other

    def _computed(self, pieces: list[Piece], events: Events) -> np.ndarray | Ranked:
        """What leaves the final norm, of all that is wanted; texts that there is no memory for leave `pieces`.

        Where the likeliest tokens are all that is asked for, these: one call is faster than three.
        """
        many = 1  # beginnings that go at once
        while pieces:
            try:
                given = [piece.given for piece in pieces]
                if all(piece.takes_likeliest for piece in pieces):
                    return self._model.ranked(given, top=_alternatives(piece.run for piece in pieces))
                return self._model.normed(given)
            except NoRoomError as error:
                if self._prefixes.drop_oldest(many):
                    many *= 2
                    continue
                newest = max(self._running, key=lambda run: run.number)
                if len(self._running) == 1:
                    self._end(newest, Failed(error), events)
                else:
                    self._set_back(newest)
                pieces[:] = [piece for piece in pieces if piece.run is not newest]
        return np.zeros((0, 0), np.float32)

    def _set_back(self, run: Run) -> None:
        """Take a text's place; it is read again later."""
        self._model.drop(run.sequence)
        run.sequence = run.read = 0
        self._running.remove(run)
        self._waiting.appendleft(run)
        self._places, self._calm = len(self._running), 0
        self._preempted += 1

    def _take(self, pieces: Sequence[Piece], found: np.ndarray | Ranked, events: Events) -> None:
        """Go on with what a step gave."""
        at, speaking, rows = 0, list[Run](), list[int]()
        for piece in pieces:
            run, begin, wanted = piece.run, piece.run.read, piece.wanted
            run.read += piece.count
            if begin < run.prompt:
                self._prompt_tokens += min(run.read, run.prompt) - begin
            at += wanted
            if not isinstance(found, Ranked):
                try:
                    self._score(run, found[at - wanted : at], run.read - wanted)
                except DeployError as error:
                    self._end(run, Failed(error), events)
                    continue
            if run.read % PAGE == 0 or run.read == run.prompt:
                known = run.scores if run.scored >= min(run.read, run.prompt) and run.read <= run.prompt else None
                self._prefixes.keep(run.ids[: run.read], run.sequence, known, adapter=run.adapter)
            if run.read < run.length:
                continue
            if not run.began:
                run.began = True
                self._cached += run.cached
                events.append((run.number, Began(run.cached, run.scores, run.begun)))
            if run.length == len(run.ids):
                self._end(run, Ended("length"), events)
            else:
                speaking.append(run)
                rows.append(at - 1)
        if not speaking:
            return
        if isinstance(found, Ranked):
            self._say(speaking, found.rows(rows), None, events=events)
        else:
            logits = self._model.head(found[rows], self._room)
            self._say(speaking, self._model.rank(logits, top=_alternatives(speaking)), logits, events=events)

    def _score(self, run: Run, normed: np.ndarray, first: int) -> None:
        """Scores of a prompt's tokens, from what its tokens from the `first` on gave."""
        if run.scores is None or run.scored >= run.prompt:
            return
        end = min(first + len(normed) + 1, run.prompt)
        while run.scored < end:
            count = min(HEAD_ROWS, end - run.scored)
            row = run.scored - 1 - first
            logits = self._model.head(normed[row : row + count], self._room)
            asked = run.ids[run.scored : run.scored + count]
            ranked = self._model.rank(logits, top=run.scores.top.shape[1], asked=asked)
            sums = ranked.log_sums[:, None]
            _check(ranked.log_sums)
            assert ranked.asked is not None
            found = Scores(ranked.asked - ranked.log_sums, ranked.ids, ranked.logits - sums)
            run.scores.put(run.scored, found)
            run.scored += count

    def _say(self, runs: Sequence[Run], ranked: Ranked, logits: np.ndarray | None, *, events: Events) -> None:
        """The next token of some texts; without logits the likeliest."""
        for row, run in enumerate(runs):
            total, token, own = ranked.log_sums[row], int(ranked.ids[row, 0]), ranked.logits[row, :1]
            try:
                _check(ranked.log_sums[row : row + 1])
                if logits is not None:
                    token = run.chooser.choose(logits[row], token)
                    own = logits[row, token : token + 1]
                if token not in run.request.stop_ids:
                    run.chooser.said(token)
            except DeployError as error:
                self._end(run, Failed(error), events)
                continue
            scores, top = None, run.request.top
            if top is not None:
                scores = Scores(
                    own - total, ranked.ids[row : row + 1, :top], ranked.logits[row : row + 1, :top] - total
                )
            if token in run.request.stop_ids:
                self._end(run, Ended("stop", token, scores), events)
                continue
            run.ids[run.length] = token
            run.length += 1
            self._tokens += 1
            events.append((run.number, Said(token, scores)))
            if run.length == len(run.ids):
                self._end(run, Ended("length"), events)

    def _end(self, run: Run, event: Event, events: Events) -> None:
        """Give back what a text has, but what the next may begin with."""
        if run in self._running:
            if not isinstance(event, Failed) and run.read > run.prompt:
                self._prefixes.keep(run.ids[: run.read], run.sequence, adapter=run.adapter)
            self._model.drop(run.sequence)
            self._running.remove(run)
            self._calm += 1
            if self._calm >= self._places < self.together:
                self._places, self._calm = self._places + 1, 0
        else:
            self._waiting.remove(run)
        self._adapters.give_back(run.adapter)
        events.append((run.number, event))


def _alternatives(runs: Iterable[Run]) -> int:
    """How many of the likeliest tokens some texts need."""
    return max((run.request.top or 1 for run in runs), default=1)


def _check(log_sums: np.ndarray) -> None:
    if not np.isfinite(log_sums).all():
        raise DeployError(
            f"the model gave logits whose sum of exponentials has the logarithm {log_sums[~np.isfinite(log_sums)][0]}",
            next_step="run `gemma-deploy parity` on the artifact",
        )
