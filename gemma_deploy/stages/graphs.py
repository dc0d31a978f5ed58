"""Graphs without weights that point into the parameter file: from the cache, or made while that file is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma_deploy.backends.base import Export, ExportJob
from gemma_deploy.job import Job
from gemma_deploy.machine import give_memory_back
from gemma_deploy.params.layout import Place
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.stages.graph_cache import GraphCache
from gemma_deploy.stages.keys import graph_cache_key

log = logging.getLogger(__name__)
DONE = "graphs.done"


class Graphs:
    """The graphs of an artifact in the making, a context manager.

    Args:
        out: the artifact's directory.
        tensors: of each parameter file, by its path in the artifact.
        unrounded: linears whose inputs are not rounded to 8 bits; None where none are.
        beside: whether memory allows to make them while the parameters are written.

    Attributes:
        is_done: whether a run before this one wrote them all.
        is_beside: whether they are being made beside something else.
    """

    def __init__(
        self,
        job: Job,
        out: Path,
        tensors: Mapping[str, Sequence[Place]],
        *,
        rescaling: Rescaling | None = None,
        unrounded: Sequence[str] | None = None,
        beside: bool = False,
    ) -> None:
        self._job, self._out = job, out
        self._export = ExportJob(job.spec, job.config, job.contract, job.parts, tensors, rescaling, unrounded)
        self._cache, self._key = GraphCache.of_user(), graph_cache_key(job, tensors, rescaling, unrounded=unrounded)
        self._running: Export | None = None
        self._beside = beside
        self.is_done = self._was_done()
        self._cached = None if self.is_done else self._cache.get(self._key, job.exported_files)

    @property
    def is_beside(self) -> bool:
        """Whether graphs are being made while parameters are written."""
        return self._beside and self._running is not None

    def __enter__(self) -> Graphs:
        """Begin, where there is anything to do and room for it."""
        if self._beside and self._cached is None and not self.is_done:
            self._running = self._job.backend.export(self._export)
        return self

    def __exit__(self, *exception: object) -> None:
        """End what is still at work."""
        if self._running is not None:
            self._running.cancel()

    def write(self) -> int | None:
        """Write every graph; the parameter files lie there.

        Returns:
            Peak RSS in bytes of a process that did it, 0 when it was this one; None when there was nothing to do.

        Raises:
            ExportError: see graph/export.py and external.py.
        """
        if self.is_done:
            return None
        from gemma_deploy.graph.external import write_graph

        give_memory_back()  # of the parameters' row blocks
        peak = 0
        files = self._cached
        if files is not None:
            log.debug("graphs as an earlier compile made them (%s)", self._key[:12])
        else:
            self._running = self._running or self._job.backend.export(self._export)
            files, peak = self._running.result()
        for file, graph in files.items():
            write_graph(graph, self._out / file)
        if self._cached is None:
            self._cache.put(self._key, files)
        (self._out / DONE).write_text(self._key)
        return peak

    def _was_done(self) -> bool:
        done = self._out / DONE
        if not (done.exists() and done.read_text() == self._key):
            return False
        return all((self._out / file).exists() for file in self._job.exported_files)
