"""`backend.type: tvm`: the static pair, compiled by TVM for a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from gemma_deploy.backends.base import Export, ExportJob, Proof
from gemma_deploy.backends.spec import BuildSpec, Options
from gemma_deploy.backends.tvm.contract import CompiledContract
from gemma_deploy.backends.tvm.options import TvmOptions, model_problems, not_built
from gemma_deploy.backends.tvm.target import cpu_of, require_known, triple_of
from gemma_deploy.backends.tvm_vacc.backend import StaticPair
from gemma_deploy.estimates import EXPORT_BYTES, GRAPH_BYTES, WRITER_BYTES, StageEstimate
from gemma_deploy.graph.contract import GraphContract

if TYPE_CHECKING:
    from gemma_deploy.artifact.manifest import LedgerEntry, Manifest
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint import ModelConfig
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.runtime.engine import Engine

COMPILE_SECONDS = 20.0  # of the 270M
COMPILER_BYTES = 600 << 20


class CompiledPair(StaticPair):
    """See `Backend` in backends/base.py."""

    runs_on = "tvm"
    rescales_float16 = False
    options: type[Options] = TvmOptions
    no_lookup = "this artifact is compiled for fixed sizes: its decode function takes one token"
    code: Sequence[str] = ("gemma_deploy.graph.worker", "gemma_deploy.backends.tvm.worker")
    proof_code: Sequence[str] = ("gemma_deploy.backends.tvm.proof",)

    def not_built(self, spec: BuildSpec) -> Iterator[str]:
        """See options.py."""
        return not_built(spec)

    def model_problems(self, spec: BuildSpec, config: ModelConfig) -> list[str]:
        """See options.py."""
        return model_problems(spec, config)

    def graphs_estimate(self) -> StageEstimate:
        """Traced, then compiled, each in a process of its own."""
        memory = WRITER_BYTES + max(EXPORT_BYTES, COMPILER_BYTES)  # this process waits beside it
        return StageEstimate("graphs", "iter0, iter1, and their library", memory, 8 * GRAPH_BYTES, COMPILE_SECONDS)

    def contract(self, spec: BuildSpec, config: ModelConfig) -> GraphContract:
        """The static pair's, and what it is compiled for."""
        given = spec.options
        assert isinstance(given, TvmOptions)
        pair = super().contract(spec, config)
        values = {field.name: getattr(pair, field.name) for field in fields(pair)}
        return CompiledContract(**values, triple=triple_of(given), cpu=cpu_of(given))

    def export(self, job: ExportJob) -> Export:
        """Trace without weights, then compile."""
        from gemma_deploy.backends.tvm.export import CompiledExport

        contract = job.contract
        assert isinstance(contract, CompiledContract)
        return CompiledExport(super().export(job), contract.triple, contract.cpu)

    def require_tools(self, spec: BuildSpec, *, proof: bool) -> None:
        """TVM, a linker for a library of this machine, and an LLVM that knows the machine."""
        from gemma_deploy.backends.tvm.export import require_linker, require_tvm

        given = spec.options
        assert isinstance(given, TvmOptions)
        require_tvm("backend.type tvm")
        require_linker(triple_of(given))
        require_known(triple_of(given), cpu_of(given))

    def ledger(self, manifest: Manifest) -> list[LedgerEntry]:
        """See `Backend`."""
        from gemma_deploy.backends.tvm.ledger import ledger_of

        return ledger_of(manifest)

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """TVM's own numbers."""
        from gemma_deploy.backends.tvm.proof import prove_compiled

        prove_compiled(proof, result)

    def engine(self, artifact: Artifact, *, threads: int = 0, strict: bool = False, one_reply: bool = False) -> Engine:
        """The library, whatever is asked of kernels: it has but one."""
        from gemma_deploy.backends.tvm.engine import CompiledEngine

        return CompiledEngine(artifact, threads=threads, strict=strict, one_reply=one_reply)

    def rounds(self, manifest: Manifest) -> bool:
        """Never."""
        return False


BACKEND = CompiledPair()
