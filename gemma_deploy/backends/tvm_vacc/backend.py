"""`backend.type: tvm_vacc`: the traced pair iter0 and iter1, static or dynamic, whole or in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemma_deploy.backends.base import PARAMS, ExportJob, Proof
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.graph.contract import GRAPHS, GraphContract, Scheme
from gemma_deploy.recipe import Recipe
from gemma_deploy.schemes import CodeForm, stored_scheme

if TYPE_CHECKING:
    from gemma_deploy.artifact.ledger import LedgerEntry
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.parity.sources import Source


class StaticPair:
    """See `Backend` in backends/base.py."""

    graphs: Sequence[str] = GRAPHS
    shares_tensors = False
    runs_in_genai = False
    kernel_names: Sequence[str] = ("strict",)

    def codes(self, recipe: Recipe) -> CodeForm:
        """Signed."""
        return CodeForm()

    def contract(self, recipe: Recipe, config: ModelConfig) -> GraphContract:
        """Of `ranks` ranks joined, with all their KV heads."""
        scheme = cast(Scheme, stored_scheme(recipe.weights))
        sizes = recipe.batch, recipe.prefill_length, recipe.context_length, recipe.dynamic, recipe.ranks
        return GraphContract.of(config, scheme, *sizes, int8_cache=recipe.int8_cache)

    def export(self, job: ExportJob) -> tuple[dict[str, bytes], int]:
        """Trace without weights, stamp, point into the parameter file; in a process of its own."""
        from gemma_deploy.graph import worker

        recipe, config = job.recipe, job.config
        tables = job.table.files
        rows = [(part, tables[part.file(PARAMS)].rows) for part in job.parts]
        task = worker.Task(
            config,
            cast(Scheme, stored_scheme(recipe.weights)),
            job.contract,
            recipe.frontend.model_kwargs.embed_scale,
            rows,
            PARAMS,
            job.rescaling,
            recipe.storage_for(config.hidden_size),
            None if job.kept is None else tuple(job.kept),
        )
        return worker.export_apart(task)

    def files(self, recipe: Recipe, config: ModelConfig) -> dict[str, dict[str, Any]]:
        """None."""
        return {}

    def kernels(self, recipe: Recipe, config: ModelConfig, kept: Sequence[str] | None) -> dict[str, Any] | None:
        """The vendor's compiler picks them."""
        return None

    def ledger(self, manifest: Mapping[str, Any]) -> list[LedgerEntry]:
        """See `Backend`."""
        from gemma_deploy.backends.tvm_vacc.ledger import ledger_of

        return ledger_of(manifest)

    def prove(self, proof: Proof, result: ParityResult) -> None:
        """Layer by layer, each cut around its linears."""
        from gemma_deploy.backends.tvm_vacc.proof import prove_pair

        prove_pair(proof, result)

    def source(self, artifact: Path, manifest: Mapping[str, Any], kernels: str = "strict") -> Source:
        """The graphs to the letter."""
        from gemma_deploy.backends.tvm_vacc.segments import StrictSource

        return StrictSource(artifact, manifest)

    def rounds(self, manifest: Mapping[str, Any]) -> bool:
        """With rounded activations (w8a8) or an int8 cache."""
        from gemma_deploy.backends.tvm_vacc.rounding import rounds

        return rounds(manifest)


BACKEND = StaticPair()
