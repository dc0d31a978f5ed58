"""The process around the application: its socket, its signals, its end."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette

from gemma_deploy.errors import UsageError

log = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 30
LARGEST_HEAD = 64 << 10  # bytes of a request's first line and headers
SWITCH_SECONDS = 0.0005  # after which the thread that computes gets the interpreter from the one that writes answers


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
        before = {one: signal.signal(one, self._told) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _told(self, number: int, frame: object) -> None:
        self.interrupted = self.interrupted or number == signal.SIGINT
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.should_exit = True


def log_answers(*, as_json: bool) -> None:
    """Write lines of answers to standard error as they are, with the time before those that are words."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if as_json else "%(asctime)s %(message)s"))
    answers = logging.getLogger("gemma_deploy.serve.answers")
    answers.handlers, answers.propagate = [handler], False


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
        bound = socket.create_server((host, port), family=family, backlog=2048)
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


def run(app: Starlette, bound: socket.socket, *, grace: int, connections: int, ready: Callable[[], None]) -> bool:
    """Answer requests until a signal.

    Args:
        bound: what `listening` gave; ready: called when requests are answered.
        grace: seconds that answers which are being made have left after the signal; connections: at most.

    Returns:
        Whether it was interrupted by Ctrl-C.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        http="h11",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace,
        h11_max_incomplete_event_size=LARGEST_HEAD,
    )
    server = Running(config)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    ready()  # the socket takes connections already, which wait until the application has begun
    try:
        server.run(sockets=[bound])
    finally:
        sys.setswitchinterval(switch)
        bound.close()
    return server.interrupted
