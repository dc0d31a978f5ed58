"""How the static pair is run: its two graphs in ONNX Runtime, by our own runner."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.tvm_vacc.generate import StaticSession
from gemma_deploy.backends.tvm_vacc.runner import StaticGraphs, StaticRunner
from gemma_deploy.backends.tvm_vacc.sessions import Mode
from gemma_deploy.backends.tvm_vacc.stage import ChainRunner, StaticStage
from gemma_deploy.errors import UsageError
from gemma_deploy.partition.spans import WHOLE
from gemma_deploy.runtime.engine import Engine, Limits, Session
from gemma_deploy.runtime.sampling import Sampling
from gemma_deploy.runtime.staged import Chain, Stage

if TYPE_CHECKING:
    from gemma_deploy.parity.sources import LogitSource


class StaticEngine(Engine):
    """See `Engine`.

    Args:
        strict: compute what the graphs say to the letter; see sessions.py.
        one_reply: give the memory of the prefill graph back after each prompt.
    """

    runtime = "static"
    kernel_names: Sequence[str] = ("strict",)

    def __init__(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> None:
        super().__init__(artifact, threads=threads)
        self.strict, self.one_reply = strict, one_reply
        self._chain: Chain | None = None

    @functools.cached_property
    def _graphs(self) -> StaticGraphs:
        mode: Mode = "strict" if self.strict else "fast"
        return StaticGraphs(self.path, mode, self.threads, manifest=self.manifest, one_prompt=self.one_reply)

    def check_runtime(self) -> None:
        """See `Engine`: ONNX Runtime is always there."""

    @property
    def limits(self) -> Limits:
        """See `Engine`: static graphs take every prompt at their own length."""
        contract = self._graphs.contract
        if contract.dynamic:
            return Limits(contract.prefill, contract.context, rows=contract.batch)
        return Limits(contract.prefill, contract.context, True, contract.batch, contract.cache_bytes)

    @property
    def load_seconds(self) -> float:
        """See `Engine`."""
        return self._graphs.load_seconds

    def session(
        self,
        sampling: Sampling | None = None,
        *,
        max_length: int | None = None,
        endless: bool = False,
        lookup: bool = False,
        draft: Engine | None = None,
    ) -> Session:
        """See `Engine`; caches have the size that the graphs say, whatever `max_length`."""
        if lookup or draft is not None:
            raise UsageError(
                "this artifact is static: its decode graph takes one token, and none that was guessed",
                where=str(self.path),
                next_step="decode without lookup or draft, or compile for backend.type onnxruntime",
            )
        with self._opening:
            runner = self._runner()
        sampler = sampling.sampler() if sampling is not None else None
        return StaticSession(runner, self.tokenizer, sampler, stop_ids=() if endless else None)

    def _runner(self) -> StaticRunner:
        return StaticRunner.on(self._graphs) if self._chain is None else ChainRunner.through(self._graphs, self._chain)

    @property
    def stages(self) -> Sequence[str]:
        """See `Engine`."""
        return tuple(dict.fromkeys(part.stage for part in self.manifest.parts if part.stage != WHOLE))

    def stage(self, name: str) -> Stage:
        """See `Engine`."""
        return StaticStage(self.artifact, name, self.threads)

    def across(self, chain: Chain) -> Engine:
        """See `Engine`."""
        made = StaticEngine(self.artifact)
        made._chain = chain
        return made

    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """See `Engine`: the graphs to the letter, every position of prompts."""
        from gemma_deploy.backends.tvm_vacc.segments import StrictSource

        if kernels is not None and kernels not in self.kernel_names:
            raise UsageError(
                f"its graphs name no kernels, so there is no '{kernels}' to evaluate",
                where=str(self.path),
                expected="an artifact of backend.type onnxruntime",
                next_step="leave --kernels out, or say strict",
            )
        return StrictSource(self.path, self.manifest, every=True)

    def _loaded_for_stream(self) -> float:
        return 0.0  # graphs are opened in the steps, which count it
