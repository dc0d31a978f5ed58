"""What this version carries out. A valid recipe that asks for more is refused, never half followed."""

from __future__ import annotations

from collections.abc import Iterator

from gemma_deploy.backends import backend
from gemma_deploy.errors import NotBuiltError
from gemma_deploy.recipe.recipe import Recipe


def check_built(recipe: Recipe) -> None:
    """Refuse what the recipe asks for and this version does not do.

    Raises:
        NotBuiltError: one sentence for each such key.
    """
    problems = [*_not_built(recipe), *backend(recipe.backend.type).not_built(recipe.spec)]
    if problems:
        raise NotBuiltError(
            "the recipe is valid, but asks for what this version does not do",
            where=f"recipe {recipe.name}",
            problems=problems,
            next_step="change the keys above in the recipe, or on the command line with -s KEY=VALUE",
        )


def _not_built(recipe: Recipe) -> Iterator[str]:
    """Whatever the back end. Building a feature removes its sentence."""
    spec = recipe.spec
    if spec.b2s and (spec.batch > 1 or spec.dynamic):
        # With one sequence the batch-to-sequence layout [1, batch * seq, hidden] is the usual one.
        yield (
            "frontend.model_kwargs.b2s: the batch-to-sequence layout of more than one sequence is not built yet; "
            "this version writes the low-latency layout, so set b2s: false, or frontend.shape.batch: 1"
        )
    if not recipe.backend.merge_params:
        yield (
            "backend.merge_params: separate parameter files are not built yet; "
            "both graphs share params.safetensors, so set merge_params: true"
        )
