"""`gemma-deploy serve` as a process: sockets, clients that leave, signals; without torch."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

import httpx2

from gemma_deploy.cli import main

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["onnxruntime"] = None
from gemma_deploy.cli import main
sys.exit(main(sys.argv[1:]))
"""
BODY = {"prompt": [2, 50, 60], "max_tokens": 700, "ignore_eos": True, "temperature": 0, "logit_bias": {"70": 100}}


class Process:
    """The program, with a port of its own."""

    def __init__(self, *words, port=0, **options):
        command = [sys.executable, "-c", PROGRAM, "serve", *map(str, words), "--port", str(port), "--threads", "1"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)
        line = self.process.stdout.readline()
        found = re.search(r"serving (.*) at (http://\S+)/v1", line)
        assert found, line + self.process.communicate()[1]
        self.names, self.url = found[1].split(", "), found[2]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def process(served, request):
    found = Process(served, *getattr(request, "param", ()))
    yield found
    found.process.kill()
    found.process.communicate()


def gauge(url, name):
    text = httpx2.get(f"{url}/metrics").text
    return int(re.search(rf"^gemma_deploy_{name}{{.*}} (\d+)$", text, re.MULTILINE)[1])


def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_clients_come_and_leave_and_a_signal_lets_answers_end(process):
    url = process.url
    assert process.names == ["x"]
    answer = httpx2.post(f"{url}/v1/completions", json=BODY | {"max_tokens": 5}, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 5
    # A stream whose client leaves, and a whole answer whose client does not wait.
    long = BODY | {"n": 100}
    with httpx2.stream("POST", f"{url}/v1/completions", json=long | {"stream": True}, timeout=60) as stream:
        next(stream.iter_lines())
    until(lambda: gauge(url, "requests_running") == 0)
    made = gauge(url, "generation_tokens_total")
    assert made < 100 * 700
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{url}/v1/completions", json=long, timeout=0.05)
    until(lambda: gauge(url, "requests_running") == 0)
    assert gauge(url, "generation_tokens_total") < made + 100 * 700
    # A stream that is running when the program is to end.
    with httpx2.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}, timeout=60) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        process.process.send_signal(signal.SIGTERM)
        until(lambda: refused(url))
        events = [json.loads(line[6:]) for line in (first, *lines) if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(event["choices"][0]["text"] for event in events) == "c" * 700
    _, said = process.process.communicate(timeout=60)
    assert process.process.returncode == 0
    assert "Traceback" not in said
    assert len(re.findall("id=cmpl-", said)) == 4


def refused(url):
    try:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=1):
            return False
    except OSError:
        return True


def test_adapters_are_served_without_torch(adaptable, tmp_path):
    """One of the command line, one that is loaded later; the directory is not written to."""
    artifact, runs = adaptable / "w" / "x", adaptable / "runs"
    before = sorted(artifact.rglob("*"))
    process = Process(artifact, "--adapter", f"pirate={runs / 'pirate'}", "--allow-adapters", runs)
    try:
        assert process.names == ["x", "x:pirate"]
        url, texts = process.url, []
        loaded = httpx2.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "poet"}, timeout=60)
        assert loaded.json()["id"] == "x:poet"
        for model in ("x", "x:pirate", "x:poet"):
            body = {"prompt": [2, 50, 60], "max_tokens": 9, "temperature": 0, "logprobs": 0, "model": model}
            answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()
            texts.append(answer["choices"][0]["logprobs"]["token_logprobs"])
        assert texts[0] != texts[1] != texts[2] != texts[0]
    finally:
        code, said = process.end()
    assert code == 0
    assert "model=x:poet " in said
    assert sorted(artifact.rglob("*")) == before


@pytest.mark.slow
def test_a_log_that_nobody_reads_stops_nobody(process):
    """A pipe holds 64 KiB, which 300 lines are more than."""
    with httpx2.Client(timeout=30) as client:
        for _ in range(500):
            answer = client.post(f"{process.url}/v1/completions", json=BODY | {"max_tokens": 1})
            assert answer.status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("process", [("--grace", "1", "--json-log")], indirect=True)
def test_it_ends_within_the_stated_time_and_ctrl_c_is_told(process):
    with httpx2.stream(
        "POST", f"{process.url}/v1/completions", json=BODY | {"stream": True, "n": 200}, timeout=60
    ) as one:
        next(one.iter_lines())
        started = time.monotonic()
        code, said = process.end(signal.SIGINT)
    assert code == 130
    assert time.monotonic() - started < 5
    assert any(line.startswith('{"id": "cmpl-') for line in said.splitlines())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "without a key"),
        (["--host", "::"], "without a key"),
        (["--api-key-file", "KEYS"], "holds no keys"),
        (["--alias", "x", "ALSO"], "--alias is for one"),
        (["ALSO"], "called x"),
        (["--port", "PORT"], "is taken"),
        (["--batch-size", "0"], "--batch-size"),
        (["--adapter", "pirate=KEYS"], "takes no adapter at run time"),
        (["--adapter", "y:pirate=KEYS"], "of which artifact?"),
        (["--adapter", "x:-=KEYS"], "'-' is no name"),
        (["--adapter", "runs/pirate"], "'runs/pirate' is no name"),
        (["--adapter", "a=KEYS", "--adapter", "x:a=KEYS"], "another one is called a"),
        (["--adapter", "a="], "the directory is missing"),
        (["--alias", "x:a", "--adapter", "a=KEYS"], "a model is called x:a already"),
        (["--allow-adapters", "nowhere"], "--allow-adapters"),
        (["--host", "::", "--insecure", "--allow-adapters", "."], "--allow-adapters"),
    ],
)
def test_what_is_not_served_is_told_before_it_is_opened(served, tmp_path, capsys, words, said):
    (tmp_path / "keys").write_text("short\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = {"KEYS": str(tmp_path / "keys"), "ALSO": str(served), "PORT": str(taken.getsockname()[1])}
        assert main(["serve", str(served), *(given.get(word, word) for word in words)]) == 2
    assert said in capsys.readouterr().err
