"""Commands in processes of their own: seconds, the peak of the largest process below, the last line when one fails."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class PeerError(Exception):
    """A peer's command ended with an error; says how."""


@dataclass(frozen=True)
class Ran:
    """A command that succeeded: wall seconds and, as `/usr/bin/time -v` has it, the largest process's peak.

    A peak is never below what this process itself holds when it starts the command, which is why it imports so little.
    """

    seconds: float
    peak_rss_bytes: int
    output: str


def run(command: list[str], log: Path, environ: dict[str, str] | None = None) -> Ran:
    """Run to the end, all output into `log`, stdout returned too.

    Raises:
        PeerError: it failed; the last line it printed.
    """
    stdout = log.with_suffix(".stdout")
    # Wanted by every peer, and by none a reason to look for a newer file on the network.
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONNOUSERSITE": "1"}
    with log.open("w") as errors, stdout.open("w") as output:
        started = time.perf_counter()
        try:
            environment = {**os.environ, **quiet, **(environ or {})}
            process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        except OSError as error:
            raise PeerError(f"{command[0]}: {error.strerror}") from error
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = code = os.waitstatus_to_exitcode(status)
    printed = stdout.read_text(errors="replace")
    said = last_line(log.read_text(errors="replace")) or last_line(printed) or "without a word"
    if code < 0:
        raise PeerError(f"killed by {signal.Signals(-code).name}: {said}")
    if code:
        raise PeerError(said)
    return Ran(seconds, usage.ru_maxrss << 10, printed)


def json_of(ran: Ran) -> dict[str, Any]:
    """The last line printed.

    Raises:
        PeerError: that is no JSON object.
    """
    try:
        return dict(json.loads(last_line(ran.output)))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise PeerError(f"no JSON came: {last_line(ran.output)}") from error


def last_line(text: str) -> str:
    """Of what a process printed, carriage returns taken for line ends and warnings left out."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith("WARNING")), "")


@contextlib.contextmanager
def exclusive(lock: Path | None) -> Iterator[None]:
    """Hold a lock file, as `flock -x FILE` does, for as long as something is timed."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_all(path: Path) -> int:
    """Bring a file or all files of a directory into the page cache; their bytes."""
    total, block = 0, bytearray(8 << 20)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(block):
                    total += count
    return total
