"""The process around the application: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import ipaddress
import json
import logging
import logging.handlers
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_deploy.errors import UsageError
from gemma_deploy.serve.http.errors import ApiError
from gemma_deploy.serve.worker import SWITCH_SECONDS

log = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 30
LARGEST_HEAD = 64 << 10  # bytes of a request's first line and headers
REFUSED_SECONDS = 1.0  # that a client has to read that it is refused
READ_SECONDS = 60.0  # in which a client has to read something, where something waits for it
HEAD_SECONDS = 15.0  # in which they have to be there
MOST_LINES = 10_000  # of the log that wait to be written
FLUSH_SECONDS = 2.0  # in which the last ones are, where somebody reads them
OTHER_FILES = 100  # open beside connections
AT_A_TIME = 256  # connections that are taken before those that came with the last are looked at
BACKLOG = 4096  # that wait in the kernel, which may have fewer: beyond it clients hear nothing for seconds
TURNS = 4  # of them that are open at once, those that are being refused with them
_BUSY = json.dumps(ApiError(503, "too many connections", code="too_many_connections").body()).encode()
REFUSED = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: " + str(len(_BUSY)).encode() + b"\r\n\r\n" + _BUSY
)


class BoundedProtocol(H11Protocol):
    """Connections that cost little: not too many of them, and none that takes its time with the head of a request.

    Attributes:
        most: connections there may be; refused: those beyond that are still open.
    """

    most = 1000
    refused: ClassVar[set[BoundedProtocol]] = set()
    _timer: asyncio.TimerHandle | None = None
    _looking: asyncio.TimerHandle
    _waited, _read = 0, False  # bytes that waited for the client at the last look; whether it has read much since

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        super().connection_made(transport)
        self._looking = self.loop.call_later(READ_SECONDS, self._look)
        if len(self.connections) > self.most:
            self._refuse()
        else:
            self._wait()

    def _refuse(self) -> None:
        """Say so, and wait for a moment: where a client's bytes were not read, closing takes the answer from it."""
        self.connections.discard(self)
        self.transport.write(REFUSED)
        if len(self.refused) >= AT_A_TIME:
            self.transport.close()
            return
        self.refused.add(self)
        self.transport.write_eof()
        self._timer = self.loop.call_later(REFUSED_SECONDS, self._slow)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self in self.refused:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_no_more()
        elif self._timer is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._wait_no_more()
        self._looking.cancel()
        self.refused.discard(self)
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        """See asyncio."""
        self._read = True
        super().resume_writing()

    def _look(self) -> None:
        """Give up whom an answer waits for as before; one that is sent, or a connection that is closed, too."""
        waits = self.transport.get_write_buffer_size()
        if self._waited and waits >= self._waited and not self._read:
            self.transport.abort()
            return
        self._waited, self._read = waits, False
        self._looking = self.loop.call_later(READ_SECONDS, self._look)

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._slow)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()


def one_length(app: ASGIApp) -> ASGIApp:
    """An application that refuses requests with two lengths: a proxy may believe the other (RFC 9112, 6.1)."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        if {b"content-length", b"transfer-encoding"} <= names:
            refusal = ApiError(400, "the request has both Content-Length and Transfer-Encoding").response()
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
            return
        await app(scope, receive, send)

    return checked


class Running(uvicorn.Server):
    """Answers until a signal; one that asks politely is no error.

    Attributes:
        interrupted: whether somebody pressed Ctrl-C.
    """

    interrupted = False
    should_exit: bool
    force_exit: bool

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn, which sends itself the signal again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self._told) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn, whose one number is both how many are accepted in one go and how many wait in the kernel."""
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(BACKLOG)

    def _told(self, number: int, frame: object) -> None:
        self.interrupted = self.interrupted or number == signal.SIGINT
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.should_exit = True


class _Dropping(logging.handlers.QueueHandler):
    """Lines for another thread to write; where nobody reads them they are left out, and the server goes on."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """See logging."""
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


def log_apart(*, as_json: bool) -> None:
    """Have another thread write the log, so that nobody waits where it is not read.

    Lines of answers go to standard error as they are, with the time before those that are words; others as before.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if as_json else "%(asctime)s %(message)s"))
    answers, root = logging.getLogger("gemma_deploy.serve.answers"), logging.getLogger()
    answers.propagate = False
    for logger, handlers in ((answers, [handler]), (root, list(root.handlers))):
        lines: queue.Queue[logging.LogRecord] = queue.Queue(MOST_LINES)
        logging.handlers.QueueListener(lines, *handlers).start()  # a daemon, for which the end waits a moment
        atexit.register(_wait_for, lines)
        logger.handlers = [_Dropping(lines)]
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each client that has left


def _wait_for(lines: queue.Queue[logging.LogRecord]) -> None:
    end = time.monotonic() + FLUSH_SECONDS
    while lines.unfinished_tasks and time.monotonic() < end:
        time.sleep(0.01)


def loopback(host: str) -> bool:
    """Whether nobody but programs of this machine reach a host."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 takes a free one.

    Raises:
        UsageError: it cannot be.
    """
    host = host.strip("[]")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise UsageError(
            f"port {port} is taken" if taken else f"nothing can listen there: {error.strerror or error}",
            where=f"{host}:{port}",
            next_step="end the program that has it, or give another --port"
            if taken
            else "give another --host or --port",
        ) from None
    bound.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    )  # connections have it too: else a first token waits 40 ms
    return bound


def server_of(app: Starlette, *, grace: int, connections: int, at_a_time: int = AT_A_TIME) -> Running:
    """What answers requests.

    Args:
        grace: seconds that answers which are being made have left after a signal; connections: at most; at_a_time:
            what `open_enough` gives.
    """
    config = uvicorn.Config(
        one_length(app),
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        http=type("Bounded", (BoundedProtocol,), {"most": connections, "refused": set()}),
        server_header=False,
        proxy_headers=False,
        backlog=at_a_time,  # asyncio accepts as many in one go, without closing any
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace,
        h11_max_incomplete_event_size=LARGEST_HEAD,
    )
    return Running(config)


def run(server: Running, bound: socket.socket, ready: Callable[[], None]) -> bool:
    """Answer requests until a signal.

    Args:
        bound: what `listening` gave; ready: called when requests are answered.

    Returns:
        Whether it was interrupted by Ctrl-C.
    """
    switch = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    ready()  # the socket takes connections already, which wait until the application has begun
    try:
        server.run(sockets=[bound])
    finally:
        sys.setswitchinterval(switch)
        bound.close()
    return server.interrupted


def open_enough(connections: int) -> int:
    """Have the system allow files for so many connections, and for those that are refused, as far as it does.

    Returns:
        How many may be accepted at a time.

    Raises:
        UsageError: it does not.
    """
    most = connections + OTHER_FILES + TURNS * AT_A_TIME
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < most:
        if hard != resource.RLIM_INFINITY and hard < connections + OTHER_FILES:
            raise UsageError(
                f"--connections {connections}: this process may have {hard} files open",
                next_step=f"give --connections {max(1, hard - OTHER_FILES)} or fewer, or raise the limit (ulimit -Hn)",
            )
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, (most - connections - OTHER_FILES) // TURNS)
