"""Running one mutated input and judging how it ended; many of them in a process of their own, with limits."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

GIGABYTE = 1 << 30
SECONDS = 5.0  # of a processor: other programs may be running
PATIENCE = 60.0  # until a case that does nothing at all is ended
CODES = (0, 1, 2, 130)
EXCEPTION, SLOW, LARGE = "other exceptions", "over 5 s", "over 1 GB"


class UnexplainedError(Exception):
    """The program ended without an exception and still not as it should."""


class NoMemoryError(Exception):
    """The program said that the system gave it no memory: more than the gigabyte it has here."""


@dataclass(frozen=True)
class Surface:
    """One kind of input.

    Args:
        prepare: (inputs made once, an empty folder) -> what `attempt` needs.
        attempt: makes one mutated input and uses it; whatever it raises is a finding.
    """

    name: str
    prepare: Callable[[Any, Path], Any]
    attempt: Callable[[Any, Random], None]


@dataclass(frozen=True)
class Finding:
    """A case that did not end as it should."""

    surface: str
    number: int
    kind: str
    text: str


@dataclass
class Outcome:
    """What many cases of one surface gave."""

    surface: str
    cases: int = 0
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    largest: int = 0

    def count(self, kind: str) -> int:
        """Findings of a kind."""
        return sum(one.kind == kind for one in self.findings)


def run(*arguments: Any) -> tuple[int, str, str]:
    """`gemma-deploy ARGUMENTS` in this process: exit code, standard output, standard error.

    Raises:
        UnexplainedError: an exit code that it does not have, or an error without a sentence.
        NoMemoryError: it had too little memory.
    """
    from gemma_deploy.cli import main

    shown, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
        code = main([str(argument) for argument in arguments])
    if "the system gives no more memory" in said.getvalue():
        raise NoMemoryError(said.getvalue())
    if code not in CODES or (code and not said.getvalue().strip() + shown.getvalue().strip()):
        raise UnexplainedError(f"exit code {code}, {said.getvalue()!r}")
    return code, shown.getvalue(), said.getvalue()


def random_of(surface: str, number: int) -> Random:
    """The generator of a case: of its surface and number alone."""
    return Random(f"{surface} {number}")


def judge(surface: Surface, state: Any, number: int) -> tuple[Finding | None, float, int]:
    """Run one case here.

    Returns:
        What was wrong (None when nothing was), seconds of the processor, and by how many bytes memory grew.
    """
    base, finding = _reset_peak(), None
    started = time.process_time()
    try:
        surface.attempt(state, random_of(surface.name, number))
    except (NoMemoryError, MemoryError) as error:
        finding = Finding(surface.name, number, LARGE, str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        last = traceback.format_exception(error)
        finding = Finding(surface.name, number, EXCEPTION, "".join(last))
    seconds = time.process_time() - started
    grown = max(0, _status("VmHWM") - base) if base else 0
    if finding is None and grown > GIGABYTE:
        finding = Finding(surface.name, number, LARGE, f"{grown / 1e9:.1f} GB")
    if finding is None and seconds > SECONDS:
        finding = Finding(surface.name, number, SLOW, f"{seconds:.1f} s")
    return finding, seconds, grown


def run_many(surface: Surface, inputs: Any, folder: Path, count: int, first: int = 0) -> Outcome:
    """Cases `first` to `first + count` in forked processes, which are ended when they take too long."""
    outcome, number = Outcome(surface.name), first
    started = time.monotonic()
    while number < first + count:
        for reply in _worker(surface, inputs, folder, number, first + count):
            finding, seconds, grown = reply
            outcome.cases += 1
            outcome.slowest, outcome.largest = max(outcome.slowest, seconds), max(outcome.largest, grown)
            if finding is not None:
                outcome.findings.append(finding)
            number += 1
    outcome.seconds = time.monotonic() - started
    return outcome


def _worker(
    surface: Surface, inputs: Any, folder: Path, first: int, stop: int
) -> Iterator[tuple[Finding | None, float, int]]:
    """What a process gives for each case, and a finding of ours for the one it dies of."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(surface, inputs, folder, first, stop, theirs))
    process.start()
    theirs.close()
    number, prepared = first, False
    try:
        while number < stop:
            if not ours.poll(PATIENCE if prepared else 10 * PATIENCE):
                yield Finding(surface.name, number, SLOW, f"no end after {PATIENCE:.0f} s"), PATIENCE, 0
                return
            try:
                reply = ours.recv()
            except EOFError:
                process.join()
                text = f"the process ended with code {process.exitcode}"
                yield Finding(surface.name, number, EXCEPTION, text), 0.0, 0
                return
            if not prepared:
                if reply is not None:
                    raise RuntimeError(f"the sound input of {surface.name} could not be made: {reply}")
                prepared = True
                continue
            yield reply
            number += 1
    finally:
        process.kill()
        process.join()
        ours.close()


def _serve(
    surface: Surface, inputs: Any, folder: Path, first: int, stop: int, pipe: multiprocessing.connection.Connection
) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what libraries in C print
        os.dup2(null, descriptor)
    place = folder / f"{surface.name}-{first}"
    place.mkdir(parents=True)
    os.chdir(place)
    try:
        state = surface.prepare(inputs, place)
    except BaseException:
        pipe.send(traceback.format_exc())
        raise
    pipe.send(None)
    # Address space is not memory: threads and arenas of malloc reserve some that they never touch.
    limit = _status("VmSize") + 3 * GIGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(first, stop):
        pipe.send(judge(surface, state, number))
    pipe.close()
    os._exit(0)


def _reset_peak() -> int:
    """Resident bytes now, from which the kernel counts the peak anew; 0 where it does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0
