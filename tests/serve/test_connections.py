"""Far more connections than there may be, of a process that may have few files open."""

import json
import re
import resource
import signal
import socket
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

import httpx2

from tests.serve.test_bounds import answer_of
from tests.serve.test_command import BODY, Process

MOST, MANY, FILES = 10, 400, 115  # connections taken and asked for; files: five more than these and others need


def few_files():
    """In the process before it begins."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def resident(process):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.process.pid}/status").read_text())[1]) / 1024


def test_connections_by_the_hundred_are_refused_and_others_go_on(served):
    process = Process(served, "--connections", str(MOST), preexec_fn=few_files)
    address = ("127.0.0.1", int(process.url.rsplit(":", 1)[1]))
    try:
        body = BODY | {"stream": True, "n": 8}
        with httpx2.stream("POST", f"{process.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            before = resident(process)
            process.process.send_signal(signal.SIGSTOP)  # so that all of them come at one moment
            many = [socket.create_connection(address) for _ in range(MANY)]
            process.process.send_signal(signal.SIGCONT)
            refused = [answer_of(one) for one in many[MOST - 1 :]]
            assert all(one.startswith(b"HTTP/1.1 503") for one in refused)
            assert {json.loads(one.split(b"\r\n\r\n")[1])["error"]["code"] for one in refused} == {
                "too_many_connections"
            }
            assert resident(process) < before + 50
            events = [json.loads(line[6:]) for line in (first, *lines) if line.startswith("data: {")]
        assert [one["choices"][0]["finish_reason"] for one in events].count("length") == 8
        for one in many:
            one.close()
        answers = [httpx2.post(f"{process.url}/v1/completions", json=BODY | {"max_tokens": 3}) for _ in range(MOST)]
        assert {one.status_code for one in answers} == {200}
        code, said = process.end()
        assert code == 0
        assert "resource" not in said
        assert "Traceback" not in said
    finally:
        process.process.kill()
        process.process.communicate()
