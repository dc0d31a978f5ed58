"""Answers in pieces (server-sent events), and those that come at once; either ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gemma_deploy.serve.http.errors import ApiError
from gemma_deploy.serve.http.served import Asked

log = logging.getLogger(__name__)
SEND_SECONDS = 60.0  # that a client may take to read what has been sent
AHEAD = 16  # pieces of an answer that wait to be sent
T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody waits for the answer."""


def event(body: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Events, and `[DONE]` behind them where they have no names.

    Args:
        asked: what is computed for them, and is no more where the client leaves or stops reading.
        done: called at the end, whatever that is.
        named: whether the type of a body is the name of its event; such streams tell what fails themselves.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        bodies: AsyncIterator[Mapping[str, Any]],
        asked: Sequence[Asked],
        done: Callable[[], None],
        *,
        named: bool = False,
    ) -> None:
        events = _named(bodies) if named else _events(bodies)
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._asked, self._done = asked, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette."""

        async def in_time(message: Any) -> None:
            async with asyncio.timeout(SEND_SECONDS):  # Python 3.11's wait_for may swallow the end of this task
                await send(message)

        try:
            await super().__call__(scope, receive, in_time)
        except TimeoutError:
            log.warning("a client read nothing for %g s: its answer ends", SEND_SECONDS)
        finally:
            for one in self._asked:
                one.leave()
            self._done()


async def _events(bodies: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for body in bodies:
            yield event(body)
    except ApiError as error:  # the status is sent already
        yield event(error.body())
        return
    yield b"data: [DONE]\n\n"


async def _named(bodies: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    async for body in bodies:
        yield event(body, body["type"])


async def merged(sources: Sequence[AsyncIterator[T]]) -> AsyncIterator[T]:
    """What several give, as it comes.

    Raises:
        ApiError: one of them fails; the others end.
    """
    if len(sources) == 1:
        async for item in sources[0]:
            yield item
        return
    found: asyncio.Queue[tuple[T | None, BaseException | None]] = asyncio.Queue(AHEAD)

    async def pump(source: AsyncIterator[T]) -> None:
        try:
            async for item in source:
                await found.put((item, None))
        except ApiError as error:
            await found.put((None, error))
            return
        await found.put((None, None))

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            one, error = await found.get()
            if error is not None:
                raise error
            if one is None:
                left -= 1
            else:
                yield one
    finally:
        for task in tasks:
            task.cancel()


async def unless_left(request: Request, work: Coroutine[Any, Any, T], asked: Sequence[Asked]) -> T:
    """Do something as long as the client waits for it.

    Raises:
        ClientLeft: it does not; what is computed ends.
    """

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        for one in asked:
            one.leave()
