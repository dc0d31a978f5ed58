"""The text of an answer as it comes: pieces that end inside no character, cut before stop strings."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from gemma_deploy.serve.http.served import Asked, Served
from gemma_deploy.serve.request import Began, Ended, Said, Scores
from gemma_deploy.text import StopStrings, TextStream


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Args:
        scores: of it alone, where they were asked for; offset: characters of the answer before it.
    """

    id: int
    scores: Scores | None
    offset: int


@dataclass(frozen=True)
class Piece:
    """What came with one token, or at the end.

    Args:
        text: that can be passed on; token: the one that was said, the stop token too; finish: why it ended, or None.
        stop: what ended it: a stop string, or one of the request's own stop tokens.
    """

    text: str
    token: Token | None = None
    finish: str | None = None
    stop: str | int | None = None


class Speech:
    """See the module.

    Args:
        stops: texts that end the answer; shown: special tokens that are text all the same.

    Attributes:
        tokens: that were said, a stop token among them; cached: of the prompt, known before; first: seconds to the
            first token, 0 so far; began: what came of the prompt.
    """

    def __init__(
        self, served: Served, asked: Asked, *, stops: Sequence[str] = (), shown: Mapping[int, str] | None = None
    ) -> None:
        self.asked, self.tokens, self.first, self.seconds = asked, 0, 0.0, 0.0
        self.finish: str | None = None
        self._served, self._strings = served, StopStrings(stops)
        self._stream = TextStream(served.tokenizer, shown)
        self.began: Began | None = None

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were known before."""
        return self.began.cached if self.began is not None else 0

    @property
    def queued(self) -> float | None:
        """Seconds that it waited until it began to be computed; None: it has not."""
        return None if self.began is None else self.began.begun - self.asked.started

    async def begin(self) -> Began:
        """Wait until the prompt has been read.

        Raises:
            ApiError: it cannot be.
        """
        if self.began is None:
            event = await self.asked.next()
            assert isinstance(event, Began), event
            self.began = event
            self._served.metrics.queue.add(event.begun - self.asked.started)
        return self.began

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer.

        Raises:
            ApiError: it fails on the way.
        """
        await self.begin()
        count, last = 0, time.perf_counter()
        while self.finish is None:
            event = await self.asked.next()
            assert isinstance(event, Said | Ended), event
            if isinstance(event, Said):
                last = self._timed(last)
                offset = count
                said = self._stream.push(event.token)
                count += len(said)
                yield self._piece(said, Token(event.token, event.scores, offset))
                continue
            held = self._strings.push(self._stream.flush()) + self._strings.flush()
            token, stop = None, None
            if event.token is not None:
                self._timed(last)
                token = Token(event.token, event.scores, count)
                stop = None if event.token in self._served.stop_ids else event.token
            found = self._strings.found
            self._end("stop" if found is not None else event.reason)
            yield Piece(held, token, self.finish, found if found is not None else stop)

    def _piece(self, said: str, token: Token) -> Piece:
        least = self.asked.request.choice.min_tokens  # no stop string counts before
        text = said if self.tokens <= least else self._strings.push(said)
        if self._strings.found is None:
            return Piece(text, token)
        self.asked.leave()
        self._end("stop")
        return Piece(text, token, self.finish, self._strings.found)

    def _timed(self, last: float) -> float:
        """A token came."""
        now, metrics = time.perf_counter(), self._served.metrics
        self.tokens += 1
        if self.tokens == 1:
            self.first = now - self.asked.started
            metrics.first.add(self.first)
        else:
            metrics.between.add(now - last)
        return now

    def _end(self, reason: str) -> None:
        self.finish, self.seconds = reason, time.perf_counter() - self.asked.started
        self._served.metrics.end(reason)
