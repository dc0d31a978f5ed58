"""The graphs of a pair, and the library that TVM makes of them, each in a process of its own."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from typing import Any

from gemma_deploy import child, extras
from gemma_deploy.backends.base import Export
from gemma_deploy.backends.tvm.target import file_of, is_own
from gemma_deploy.backends.tvm.worker import Task
from gemma_deploy.errors import DeployError, ExportError, UsageError

LINKERS = ("g++", "clang++")  # what TVM looks for


def require_tvm(what: str) -> None:
    """See that TVM is installed.

    Raises:
        UsageError: it is not.
    """
    extras.require("tvm", what=what)


def require_linker(triple: str) -> None:
    """See that a library can be linked, where one is made.

    Raises:
        UsageError: there is no linker.
    """
    if is_own(triple) and not any(map(shutil.which, LINKERS)):
        raise UsageError(
            "backend.type tvm links a library, and no compiler is installed that could",
            expected=" or ".join(LINKERS),
            next_step="install one (apt install g++), or write backend.type: native or onnxruntime",
        )


class CompiledExport:
    """An `Export` as in backends/base.py.

    Args:
        graphs: the pair in the making; triple, cpu: of LLVM.
    """

    def __init__(self, graphs: Export, triple: str, cpu: str) -> None:
        self._graphs, self._triple, self._cpu = graphs, triple, cpu
        self._process: Any = None

    def result(self) -> tuple[dict[str, bytes], int]:
        """See `Export`.

        Raises:
            ExportError: the compiling process died. DeployError: it says why there is no library.
        """
        files, peak = self._graphs.result()
        file = file_of(self._triple)
        graphs = {name.removesuffix(".onnx"): graph for name, graph in files.items()}
        process = child.start("-m", "gemma_deploy.backends.tvm.worker", stdin=child.PIPE, stdout=child.PIPE)
        self._process = process
        with contextlib.suppress(BrokenPipeError):  # it died; its exit code says how
            found, _ = process.communicate(pickle.dumps(Task(graphs, self._triple, self._cpu, file)))
        if process.returncode:
            raise ExportError(
                f"the process that compiles with TVM ended with exit code {process.returncode}",
                where="export stage",
                next_step="if it was killed for memory (-9), free some; else its lines above say why",
            )
        answer, its_peak = pickle.loads(found)  # our own child's
        if isinstance(answer, DeployError):
            raise answer
        return {**files, file: answer}, max(peak, its_peak)

    def cancel(self) -> None:
        """See `Export`."""
        self._graphs.cancel()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
