"""Servers in processes of their own: started, measured in turns, stopped while others are measured."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from peer_runtimes.processes import PeerError, last_line

from gemma_deploy.bench.requests import Answer, Load, summary
from gemma_deploy.bench.server import measure_server
from gemma_deploy.client import Target
from gemma_deploy.errors import DeployError

START_SECONDS, END_SECONDS, LOOK_SECONDS = 300.0, 20.0, 0.1
VOCABULARY = 256_000


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


class Running:
    """A process that was started, with all that it starts: `ready` waits until it answers.

    Args:
        command, environ: of the process; log: a file for what it prints.
        port: that it listens at; 0 for a loop that takes loads as lines.
    """

    def __init__(self, command: Sequence[str], environ: dict[str, str], *, log: Path, port: int = 0) -> None:
        self.port, self._log, self._errors = port, log, log.open("w")
        pipes: dict[str, Any] = {"stdout": self._errors}
        if not port:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONNOUSERSITE": "1"}
        try:
            self._process = subprocess.Popen(
                command, stderr=self._errors, env={**os.environ, **quiet, **environ}, start_new_session=True, **pipes
            )
        except OSError as error:
            raise PeerError(f"{command[0]}: {error.strerror}") from error
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        if self._process.stdout is not None:
            threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._lines.put(line)

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> None:
        """Wait until it answers.

        Raises:
            PeerError: it ended, or needs too long.
        """
        if not self.port:
            self._line()
            return
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            self._alive()
            with contextlib.suppress(OSError, urllib.error.HTTPError):
                urllib.request.urlopen(f"{self.url}/v1/models", timeout=5).close()
                return
            time.sleep(0.5)
        raise PeerError(f"no answer within {START_SECONDS:.0f} s: {self._said()}")

    def measure(self, loads: Sequence[Load], seed: int) -> list[dict[str, Any]]:
        """The `summary` of each load, behind one request of its size that does not count.

        Raises:
            PeerError: it failed, or a request did.
        """
        if self.port:
            try:
                found = measure_server(Target(self.url, vocabulary=VOCABULARY), loads, seed=seed)["loads"]
            except DeployError as error:
                raise PeerError(str(error)) from error
        else:
            found = []
            for number, load in enumerate(loads):
                self._answers(Load(load.input_tokens, load.output_tokens, 1, 1), seed + 1000 + number)
                found.append(summary(load, self._answers(load, seed + 100 + number), {}))
        problems = [problem for one in found for problem in one["problems"]]
        if problems:
            raise PeerError(problems[0])
        return list(found)

    def _answers(self, load: Load, seed: int) -> list[Answer]:
        asked = {
            "input_tokens": load.input_tokens, "output_tokens": load.output_tokens, "concurrency": load.concurrency,
            "requests": load.requests, "vocabulary": VOCABULARY, "seed": seed,
        }  # fmt: skip
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(asked) + "\n")
            stdin.flush()
        answers = [Answer(**one) for one in self._line()]
        for one in answers:
            if one.tokens != load.output_tokens:
                one.problem = f"answered {one.tokens} tokens instead of {load.output_tokens}"
        return answers

    def _line(self) -> Any:
        """What the loop answers next. Processes that it started may hold its output open when it is gone."""
        while True:
            ended = self._process.poll() is not None
            try:
                return json.loads(self._lines.get(timeout=LOOK_SECONDS))
            except json.JSONDecodeError:
                continue
            except queue.Empty:
                if ended:
                    raise PeerError(self._said()) from None

    def sleep(self) -> None:
        """Let nothing of it run."""
        self._signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for as long as the block does."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.sleep()

    def stop(self) -> None:
        """End it and all that it started."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._errors.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _alive(self) -> None:
        if self._process.poll() is not None:
            raise PeerError(self._said())

    def _said(self) -> str:
        self._errors.flush()
        return last_line(self._log.read_text(errors="replace")) or "without a word"
