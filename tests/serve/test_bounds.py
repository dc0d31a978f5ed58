"""Clients that are slow, many, or read nothing: real sockets, the server in a thread of this process."""

import contextlib
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("uvicorn")

from gemma_deploy.errors import UsageError
from gemma_deploy.serve.http import app, running, streaming
from tests.serve.test_http import COMPLETIONS, engine, served_of  # noqa: F401

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@contextmanager
def running_server(engine, connections=50, *, settings=None, **options):  # noqa: F811
    """(host, port), and what is served there."""
    served = served_of(engine, **options)
    server = running.server_of(app.Server([served], settings).app(), grace=2, connections=connections)
    bound = running.listening("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, args=(server, bound, lambda: None))
    address = bound.getsockname()
    thread.start()
    try:
        yield address, served
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def answer_of(connection, seconds=20):
    """All that a server says before it closes."""
    connection.settimeout(seconds)
    found = b""
    while piece := connection.recv(1 << 16):
        found += piece
    return found


def asked(**body):
    text = json.dumps(body).encode()
    return HEAD + b"Connection: close\r\nContent-Length: " + str(len(text)).encode() + b"\r\n\r\n" + text


def test_slow_heads_and_bodies_are_given_up_and_others_answered(engine, monkeypatch):  # noqa: F811
    monkeypatch.setattr(running, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.4)
    with running_server(engine) as (address, _):
        silent, slow, body = (socket.create_connection(address) for _ in range(3))
        slow.sendall(HEAD)
        body.sendall(HEAD + b"Connection: close\r\nContent-Length: 50\r\n\r\n{")
        with socket.create_connection(address) as good:
            good.sendall(asked(prompt="a", max_tokens=2))
            assert answer_of(good).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        assert answer_of(silent) == answer_of(slow) == b""
        assert answer_of(body).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 5
        with socket.create_connection(address) as kept:  # the time of a head does not count while it is answered
            kept.sendall(asked(prompt=[2, 50], max_tokens=700, ignore_eos=True, n=8))
            assert b'"completion_tokens":5600' in answer_of(kept, 60).replace(b" ", b"")


def test_more_connections_than_there_may_be_are_refused_politely(engine):  # noqa: F811
    with running_server(engine, connections=3) as (address, _):
        idle = [socket.create_connection(address) for _ in range(3)]
        for _ in range(20):
            with socket.create_connection(address) as more:
                more.sendall(asked(prompt="a" * 100_000))  # which nobody reads
                said = answer_of(more)
                assert said.startswith(b"HTTP/1.1 503")
                assert b"Retry-After" in said
                assert json.loads(said.split(b"\r\n\r\n")[1])["error"]["code"] == "too_many_connections"
        idle[0].sendall(asked(prompt="a", max_tokens=2))
        assert answer_of(idle[0]).startswith(b"HTTP/1.1 200")
        for one in idle:
            one.close()


def test_who_reads_nothing_costs_a_bounded_buffer_and_is_given_up(engine, monkeypatch):  # noqa: F811
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.5)
    with running_server(engine) as (address, served):
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(address)
        stalled.sendall(asked(prompt=[2, 50], max_tokens=700, ignore_eos=True, n=200, stream=True, logprobs=3))
        end = time.monotonic() + 30
        while served.worker.counts().running == 0:
            assert time.monotonic() < end
            time.sleep(0.01)
        while served.worker.counts().running or served.worker.counts().waiting:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert served.worker.counts().tokens < 200 * 700  # it was given up long before all were made
        with socket.create_connection(address) as good:
            good.sendall(asked(prompt="a", max_tokens=2))
            assert answer_of(good).startswith(b"HTTP/1.1 200")
        stalled.close()


@pytest.mark.parametrize(
    ("body", "times"),
    [
        ({"n": 20, "max_tokens": 200, "logprobs": 5}, 1),
        ({"n": 20, "max_tokens": 200, "logprobs": 5, "stream": True}, 1),
        ({"max_tokens": 0}, 2000),
    ],
    ids=["whole", "streamed", "many"],
)
def test_a_connection_whose_client_reads_nothing_ends(engine, monkeypatch, body, times):  # noqa: F811
    """Also of an answer that is sent already: it waits in the server for as long as the client does not read."""
    listening = running.listening

    def little(*where):
        bound = listening(*where)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what the system keeps
        return bound

    monkeypatch.setattr(running, "listening", little)
    monkeypatch.setattr(running, "READ_SECONDS", 0.3)
    monkeypatch.setattr(streaming, "SEND_SECONDS", 0.3)
    with running_server(engine, connections=1) as (address, _):
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(address)
        one = asked(prompt=[2, 50], ignore_eos=True, **body).replace(b"Connection: close\r\n", b"")
        stalled.settimeout(2)
        with contextlib.suppress(OSError):
            stalled.sendall(one * times)
        end = time.monotonic() + 20
        while True:  # there is one place
            with socket.create_connection(address) as other:
                other.sendall(asked(prompt="a", max_tokens=2))
                if answer_of(other).startswith(b"HTTP/1.1 200"):
                    break
            assert time.monotonic() < end
            time.sleep(0.1)
        stalled.close()


def test_a_request_with_two_lengths_is_refused_and_nothing_behind_it_read(engine):  # noqa: F811
    text = b"4\r\nabcd\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with running_server(engine) as (address, _), socket.create_connection(address) as both:
        both.sendall(HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + text)
        said = answer_of(both)
    assert said.startswith(b"HTTP/1.1 400")
    assert said.count(b"HTTP/1.1") == 1


def test_more_files_than_a_process_may_open_are_told(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 500))
    with pytest.raises(UsageError, match="500 files"):
        running.open_enough(1000)
    found = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: found.append(limits))
    assert running.open_enough(300) == (500 - 400) // running.TURNS  # that many at a time, and as many being refused
    assert found == [(500, 500)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, resource.RLIM_INFINITY))
    assert running.open_enough(300) == running.AT_A_TIME
    assert found[1][0] == 400 + running.TURNS * running.AT_A_TIME
