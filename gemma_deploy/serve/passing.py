"""Passes two requests of OpenAI's protocol on to one server, so that the web page need not ask another origin.

Bounded in every direction: what a browser sends, what the server sends, how long either may be silent. Nothing but the
two endpoints and no other address is reached: redirects are not followed, and of headers the key and the kind pass.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gemma_deploy import client as clients
from gemma_deploy.client import Target
from gemma_deploy.errors import UsageError
from gemma_deploy.serve.visitors import OTHER_SITE, UNKNOWN_NAME, foreign

if TYPE_CHECKING:
    import httpx2

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODY_BYTES = 8 << 20  # of a request
ANSWER_BYTES = 64 << 20  # of an answer
BODY_SECONDS = 30.0  # in which a request has come whole
SENT_SECONDS = 60.0  # in which a browser takes a piece of an answer
SILENT_SECONDS = 900.0  # in which a server says something: a long prompt on a CPU takes minutes
MOST_REQUESTS = 64  # at a time
KEPT = 8  # connections that stay open between requests
ENDPOINTS = {"/v1/models": "GET", "/v1/chat/completions": "POST"}
KINDS = ("application/json", "text/event-stream")


def base_of(url: str) -> str:
    """The address of a server's endpoints, up to `/v1` and without a slash behind it.

    Args:
        url: up to `/v1`, or without it.

    Raises:
        UsageError: it is no plain http or https address.
    """
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:  # a port that is no number, half an IPv6 address
        wrong = True
    if (
        wrong
        or parts.username is not None
        or parts.query
        or parts.fragment
        or not url.isascii()
        or not url.isprintable()
    ):
        raise UsageError(
            "is no address of a server",
            where=f"--api-base-url {url}",
            expected="http or https, a host, a port if need be and a path: no name, password, query or fragment",
            next_step="name it as in http://127.0.0.1:9000/v1",
        )
    return Target(url).base


class Refused(Exception):
    """What a browser is told instead of an answer: status, and a sentence in OpenAI's error object."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(message)

    def body(self) -> bytes:
        """JSON as OpenAI's servers answer."""
        error = {"message": self.message, "type": "webui_error", "param": None, "code": self.status}
        return json.dumps({"error": error}).encode()


class PassThrough:
    """An ASGI application: the two endpoints of `base`, by a client that the caller opens and closes.

    Args:
        base: as `base_of` gives it.
        client: made by `new_client`.
        headers: which every answer has.
        hosts: names by which this server may be asked, None for any: pages of other sites reach a loopback address
            by a name of their own that leads there.
    """

    def __init__(
        self, base: str, client: httpx2.AsyncClient, *, headers: Mapping[str, str], hosts: frozenset[str] | None
    ) -> None:
        self._base, self._client, self._headers, self._hosts = base, client, dict(headers), hosts
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI; a browser that leaves ends the request to the server too."""
        answer = _Answer(send, self._headers)
        self._running += 1
        try:
            given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope, given)
            body = await _body(receive, given)
            passing = asyncio.ensure_future(self._pass(scope, given, body, answer))
            leaving = asyncio.ensure_future(_left(receive))
            try:
                await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (passing, leaving):
                    task.cancel()
                await asyncio.wait((passing, leaving))
            if not passing.cancelled():
                passing.result()
        except Refused as refused:
            await answer.refuse(refused)
        except _Left:
            return
        finally:
            self._running -= 1

    def _check(self, scope: Scope, given: Mapping[str, str]) -> None:
        host, origin = given.get("host", ""), given.get("origin")
        status = foreign(host, origin, hosts=self._hosts)
        if status == UNKNOWN_NAME:
            raise Refused(status, "this address is not known by that name: open the page as the command said")
        if status == OTHER_SITE or given.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Refused(OTHER_SITE, "requests from pages of other sites are not passed on")
        if scope["path"] not in ENDPOINTS or scope["method"] != ENDPOINTS[scope["path"]]:
            raise Refused(404, f"passed on are {', '.join(f'{verb} {path}' for path, verb in ENDPOINTS.items())}")
        if scope["method"] == "POST" and given.get("content-type", "").partition(";")[0].strip() != KINDS[0]:
            raise Refused(415, f"the body is to be {KINDS[0]}")
        if self._running > MOST_REQUESTS:
            raise Refused(503, "too many requests at a time")

    async def _pass(self, scope: Scope, given: Mapping[str, str], body: bytes, answer: _Answer) -> None:
        import httpx2

        asked = {"accept": ", ".join(KINDS), "accept-encoding": "identity", "content-type": KINDS[0]}
        if "authorization" in given:
            asked["authorization"] = given["authorization"]
        url = self._base + scope["path"].removeprefix("/v1")
        try:
            async with self._client.stream(scope["method"], url, headers=asked, content=body) as said:
                await _forward(said, answer)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Refused(502, f"there is no connection to {self._base}: {error}") from error
        except httpx2.TimeoutException as error:
            raise Refused(504, f"{self._base} says nothing any more") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise Refused(502, f"the connection to {self._base} broke: {error}") from error


def new_client(transport: httpx2.AsyncBaseTransport | None = None) -> httpx2.AsyncClient:
    """The client of a `PassThrough`.

    Args:
        transport: instead of a network.
    """
    return clients.new_client(seconds=SILENT_SECONDS, connections=MOST_REQUESTS, kept=KEPT, transport=transport)


class _Left(Exception):
    """The browser is gone."""


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive, given: Mapping[str, str]) -> bytes:
    """What a browser sends, to a limit of bytes and seconds."""
    length = given.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > BODY_BYTES:
        raise Refused(413, f"more than {BODY_BYTES >> 20} MiB")
    pieces: list[bytes] = []
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Left
                pieces.append(message.get("body", b""))
                if sum(map(len, pieces)) > BODY_BYTES:
                    raise Refused(413, f"more than {BODY_BYTES >> 20} MiB")
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError as error:
        raise Refused(408, f"the request did not come within {BODY_SECONDS:.0f} s") from error


async def _forward(said: httpx2.Response, answer: _Answer) -> None:
    """Streams event by event, anything else whole."""
    if 300 <= said.status_code < 400:
        raise Refused(502, "the server leads to another address, which is not followed: name that one to the command")
    if said.headers.get("content-encoding", "identity") != "identity":
        raise Refused(502, "the server compresses what was asked for as it is")
    kind = said.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said.status_code == 200 and kind == KINDS[1]:
        await answer.begin(200, kind)
        async for piece in _bounded(said):
            await answer.more(piece)
        await answer.end()
        return
    whole = b"".join([piece async for piece in _bounded(said)])
    # Whatever it is, it is not to be taken for a page of this server.
    await answer.begin(said.status_code, kind if kind in KINDS else "text/plain", said.headers.get("retry-after"))
    await answer.more(whole)
    await answer.end()


async def _bounded(said: httpx2.Response) -> AsyncIterator[bytes]:
    size = 0
    async for piece in said.aiter_raw():
        size += len(piece)
        if size > ANSWER_BYTES:
            raise Refused(502, f"the server sent more than {ANSWER_BYTES >> 20} MiB")
        yield piece


class _Answer:
    """An answer to a browser, in the order that ASGI wants it."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send, self._headers, self._begun = send, headers, False

    async def begin(self, status: int, kind: str, retry_after: str | None = None) -> None:
        """Status and headers."""
        headers = {**self._headers, "content-type": kind, "cache-control": "no-store"}
        if retry_after is not None and retry_after.isdecimal():
            headers["retry-after"] = retry_after
        lines = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": lines})

    async def more(self, body: bytes) -> None:
        """A piece; the next one is read when the browser has taken this one."""
        try:
            async with asyncio.timeout(SENT_SECONDS):
                await self._send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError as error:
            raise _Left from error

    async def end(self) -> None:
        """Nothing more comes."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, refused: Refused) -> None:
        """The sentence instead of an answer, or as the last event of one that has begun."""
        if self._begun:
            await self.more(b"\n\ndata: " + refused.body() + b"\n\n")
        else:
            await self.begin(refused.status, KINDS[0])
            await self.more(refused.body())
        await self.end()
