"""The one way in which this program starts another Python.

`python -m` and `python -c` put the current directory first among the places where modules are looked for, and so do the
processes of `multiprocessing`: an onnx_ir.py that lies in a downloaded checkpoint would run for whoever works in that
folder. Children started here look where this process looks, but never in the current directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

from gemma_deploy import paths
from gemma_deploy.errors import DeployError

PIPE = subprocess.PIPE
TimeoutExpired = subprocess.TimeoutExpired
ENDING_SECONDS = 20  # before a child that was asked to end is killed
_LENGTH = struct.Struct("<Q")  # in front of every request and answer of a `Worker`


def command(*arguments: str) -> list[str]:
    """The command line of a child.

    Args:
        arguments: for the interpreter: `-m`, MODULE and the module's own, or `-c`, CODE and the code's own.
    """
    return [sys.executable, "-P", *arguments]


def environment() -> dict[str, str]:
    """The environment of a child.

    It looks for modules where this process does, in the same order, except in the current directory; there only when
    gemma_deploy itself was imported from it. The child's own children obey as well.
    """
    places = [place for place in map(_place, sys.path) if place]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}


def _place(entry: object) -> str | None:
    """An entry of sys.path as an absolute path, None for what a child is not told."""
    if not isinstance(entry, str) or not entry:
        return None
    try:
        here = os.path.realpath(os.curdir)
        place = os.path.abspath(entry)
    except FileNotFoundError:  # the current directory has been deleted
        here, place = "", entry
    if not os.path.isabs(place) or os.pathsep in place:  # PYTHONPATH cannot hold a path with its separator
        return None
    real = os.path.realpath(place)
    return place if real != here or real == os.path.realpath(paths.PACKAGE.parent) else None


def run(
    *arguments: str, variables: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` of a child; the caller looks at its exit code.

    Args:
        arguments: see `command`.
        variables: of the environment, beside those of `environment`.
        options: of `subprocess.run`, such as `input`, `stdout`, `text` and `timeout`.
    """
    return subprocess.run(command(*arguments), env={**environment(), **variables}, check=False, **options)


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """`subprocess.Popen` of a child.

    Args:
        arguments: see `command`.
        options: of `subprocess.Popen`.
    """
    return subprocess.Popen(command(*arguments), env=environment(), **options)


@contextlib.contextmanager
def answering() -> Iterator[BinaryIO]:
    """In a child: what was its standard output, for answers alone; what libraries print goes to standard error.

    Ctrl-C, which reaches parent and child, is left to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        yield out


class Worker:
    """A child that answers requests, one at a time.

    Args:
        module: what it runs; it calls `serve`.
    """

    def __init__(self, module: str) -> None:
        self._process = start("-m", module, stdin=PIPE, stdout=PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def ask(self, request: Any) -> Any:
        """The answer to a request; both are pickled.

        Raises:
            EOFError: the child has ended. Else what it raised; what is no `DeployError` has its traceback as a note.
        """
        try:
            _send(self._requests, request)
            answer, error = pickle.loads(_receive(self._answers))  # our own child's
        except BrokenPipeError as broken:
            raise EOFError from broken
        if error is not None:
            raise error
        return answer

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self._process.terminate()

    def close(self) -> None:
        """Wait until it has ended, which it does when it has nothing left to answer."""
        with contextlib.suppress(BrokenPipeError):  # it was dead before it had read the last request
            self._requests.close()
        self._process.wait()
        self._answers.close()


class OtherPython:
    """A script in another Python, without this one's packages: requests and answers are lines of JSON.

    Args:
        python: the interpreter; script: what it runs, which looks for modules beside itself and in its own packages.
        arguments: of the script; variables: of its environment; log: what it prints besides answers.
    """

    def __init__(self, python: str, script: str, *arguments: str, variables: Mapping[str, str], log: BinaryIO) -> None:
        own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        places = {"PYTHONPATH": os.path.dirname(os.path.abspath(script)), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [python, "-P", script, *arguments],
            env={**own, **variables, **places},
            stdin=PIPE,
            stdout=PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # it has children of its own, which end with it
        )

    def ask(self, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request; without one, what it says by itself.

        Raises:
            EOFError: it has ended, or is no such script: what it says is not JSON.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if request is not None:
            try:
                print(json.dumps(request), file=self._process.stdin, flush=True)
            except BrokenPipeError as error:
                raise EOFError from error
        try:
            line = self._process.stdout.readline()
            if not line:
                raise EOFError("it ended without a word")
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:  # of characters or of JSON
            raise EOFError("it answers something else than JSON") from error
        return answer

    def stop(self) -> None:
        """End it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(ENDING_SECONDS)
        except TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def serve(handle: Callable[[Any], Any]) -> NoReturn:
    """In a `Worker`'s module: answer requests; end at once when the parent has ended, however it did.

    Args:
        handle: request -> answer; what it raises is raised in the parent.
    """
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                waiting.put(_receive(sys.stdin.buffer))
        finally:
            os._exit(0)  # the main thread may be anywhere; nothing here needs closing

    with answering() as out:
        threading.Thread(target=receive, daemon=True, name="requests").start()
        while True:
            answer: Any = None
            failure: Exception | None = None
            try:
                answer = handle(pickle.loads(waiting.get()))
            except DeployError as error:
                failure = error
            except Exception as error:
                error.add_note(traceback.format_exc())
                failure = error
            _send(out, (answer, failure))


def _send(pipe: Any, value: Any) -> None:
    data = pickle.dumps(value)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: Any) -> bytes:
    """Raises EOFError where the other end was closed."""
    head = pipe.read(_LENGTH.size)
    data: bytes = pipe.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
    if len(head) < _LENGTH.size or len(data) < _LENGTH.unpack(head)[0]:
        raise EOFError
    return data
