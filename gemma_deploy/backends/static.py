"""`backend.type: tvm_vacc`: the traced pair iter0 and iter1, static or dynamic, whole or in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from gemma_deploy.backends.target import PARAMS, Job
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.graph.contract import GRAPHS, GraphContract, Scheme
from gemma_deploy.recipe import Recipe
from gemma_deploy.schemes import CodeForm, stored_scheme


class StaticPair:
    """See target.py."""

    graphs: Sequence[str] = GRAPHS

    def codes(self, recipe: Recipe) -> CodeForm:
        """Signed."""
        return CodeForm()

    def contract(self, recipe: Recipe, config: ModelConfig) -> GraphContract:
        """Of `ranks` ranks joined, with all their KV heads."""
        scheme = cast(Scheme, stored_scheme(recipe.weights))
        sizes = recipe.batch, recipe.prefill_length, recipe.context_length, recipe.dynamic, recipe.ranks
        return GraphContract.of(config, scheme, *sizes, int8_cache=recipe.int8_cache)

    def export(self, job: Job) -> tuple[dict[str, bytes], int]:
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
