"""The export in a process of its own, beside the one that writes the parameters.

What torch's exporter leaves behind (200 MiB) is gone before the gate runs.

The child gets its task on standard input and answers on standard output; it writes no file, so that nothing is left of
it when either process is killed.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_deploy import child
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.errors import DeployError, ExportError
from gemma_deploy.graph.contract import GraphContract
from gemma_deploy.partition import ArtifactPart
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.schemes import Form, Storage

if TYPE_CHECKING:
    from gemma_deploy.graph.external import Row


@dataclass(frozen=True)
class Task:
    """What `Traced` and `attach_external` need.

    Args:
        contract: of the whole model; rows: of each part's parameter file, which is `location` beside its graphs.
        unrounded: linears whose inputs are not rounded; None where none are.
    """

    config: ModelConfig
    scheme: Form
    contract: GraphContract
    embed_scale: str
    rows: Sequence[tuple[ArtifactPart, Sequence[Row]]]
    location: str
    rescaling: Rescaling | None = None
    storage: Storage | None = None
    unrounded: tuple[str, ...] | None = None


def export_here(task: Task) -> dict[str, bytes]:
    """Both graphs of every part as .onnx files by their path in the artifact, pointing into the parameter file.

    Raises:
        ExportError, NotBuiltError: see export.py and external.py.
    """
    from gemma_deploy.graph.export import Traced
    from gemma_deploy.graph.external import attach_external, serialized

    if task.config.architecture.encoder:
        return _encoder(task)
    ranks = task.rows[0][0].ranks
    traced = Traced(
        task.config,
        task.scheme,
        task.contract,
        embed_scale=task.embed_scale,
        rescaling=task.rescaling,
        ranks=ranks,
        storage=task.storage,
        unrounded=task.unrounded,
    )
    files = {}
    for part, rows in task.rows:
        graphs = traced.graphs(part)
        attach_external(graphs, rows, task.location)
        files.update({part.file(f"{name}.onnx"): serialized(graph) for name, graph in graphs.items()})
        del graphs
        gc.collect()  # nodes and values refer to each other; those of the next part come on top otherwise
    return files


def _encoder(task: Task) -> dict[str, bytes]:
    """The one graph of an encoder, likewise."""
    from gemma_deploy.graph.encoder import export_encoder
    from gemma_deploy.graph.external import attach_external, serialized

    ((part, rows),) = task.rows
    graphs = export_encoder(
        task.config,
        task.scheme,
        task.contract,
        embed_scale=task.embed_scale,
        rescaling=task.rescaling,
        storage=task.storage,
    )
    attach_external(graphs, rows, task.location)
    return {part.file(f"{name}.onnx"): serialized(graph) for name, graph in graphs.items()}


class ExportProcess:
    """`export_here` in a child that is at work from now on; an `Export` as in backends/base.py."""

    def __init__(self, task: Task) -> None:
        self._task = pickle.dumps(task)
        self._process = child.start("-m", "gemma_deploy.graph.worker", stdin=child.PIPE, stdout=child.PIPE)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; `result` says how
            self._process.stdin.write(self._task)
            self._process.stdin.flush()

    def result(self) -> tuple[dict[str, bytes], int]:
        """The graphs, and the child's peak RSS in bytes.

        Raises:
            ExportError: it failed there, or the process died.
        """
        found, _ = self._process.communicate()
        code = self._process.returncode
        if code:
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise ExportError(
                f"the export's process ended with {cause}",
                where="export stage",
                next_step="if it was killed for memory (signal 9), free some; else report it with the lines above",
            )
        answer, peak, said = pickle.loads(found)  # our own child's
        for logger, level, message in said:
            logging.getLogger(logger).log(level, "%s", message)
        if isinstance(answer, DeployError):
            raise answer
        return answer, peak

    def cancel(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.communicate()


def export_apart(task: Task) -> ExportProcess:
    """Begin `export_here` in a child process."""
    return ExportProcess(task)


class _Said(logging.Handler):
    """What the child's modules log, for the parent to show as it is set up to: (logger, level, message)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, int, str]] = []
        logger = logging.getLogger("gemma_deploy")
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.levelno, record.getMessage()))


def main() -> None:
    """The child: read a task, answer with graphs or with the error that stands for them."""
    from gemma_deploy.machine import peak_rss_bytes

    said = _Said()
    with child.answering() as out:
        answer: dict[str, bytes] | DeployError
        try:
            answer = export_here(pickle.load(sys.stdin.buffer))
        except DeployError as error:
            answer = error
        pickle.dump((answer, peak_rss_bytes(), said.lines), out)


if __name__ == "__main__":
    main()
