"""How a compiled pair is run: as the static pair is, by TVM's functions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from gemma_deploy.backends.tvm.runner import CompiledGraphs, CompiledRunner
from gemma_deploy.backends.tvm.source import STRICT, CompiledSource
from gemma_deploy.backends.tvm_vacc.engine import StaticEngine
from gemma_deploy.errors import UsageError

if TYPE_CHECKING:
    from gemma_deploy.parity.sources import LogitSource


class CompiledEngine(StaticEngine):
    """See `Engine`."""

    runtime = "tvm"

    @functools.cached_property
    def _graphs(self) -> CompiledGraphs:
        return CompiledGraphs(self.path, threads=self.threads, manifest=self.manifest)

    def check_runtime(self) -> None:
        """See `Engine`."""
        self._graphs.check()

    def _runner(self) -> CompiledRunner:
        made = CompiledRunner.on(self._graphs)
        assert isinstance(made, CompiledRunner)
        return made

    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """See `Engine`: every position, a token at a time."""
        if kernels not in (None, STRICT):
            raise UsageError(
                f"a compiled pair has no kernels to choose from, so there is no '{kernels}' to evaluate",
                where=str(self.path),
                next_step="leave --kernels out, or say strict",
            )
        return CompiledSource(self.path, self.threads, every=True)
