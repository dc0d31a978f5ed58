"""What this version carries out. A valid recipe that asks for more is refused, never half followed."""

from __future__ import annotations

from collections.abc import Callable

from gemma_deploy.errors import NotBuiltError
from gemma_deploy.recipe.recipe import Recipe

# (is it asked for?, one sentence). Building a feature removes its line.
_NOT_BUILT: tuple[tuple[Callable[[Recipe], bool], Callable[[Recipe], str]], ...] = (
    (
        # With one sequence the batch-to-sequence layout [1, batch * seq, hidden] is the usual one.
        lambda recipe: recipe.frontend.model_kwargs.b2s and (recipe.batch > 1 or recipe.dynamic),
        lambda recipe: (
            "frontend.model_kwargs.b2s: the batch-to-sequence layout of more than one sequence is not built yet; "
            "this version writes the low-latency layout, so set b2s: false, or frontend.shape.batch: 1"
        ),
    ),
    (
        lambda recipe: recipe.frontend.adapter is not None,
        lambda recipe: (
            "frontend.adapter: merging a LoRA adapter is not built yet; "
            "merge it into the checkpoint first, and set adapter: null"
        ),
    ),
    (
        lambda recipe: recipe.onnxruntime and recipe.backend.dtype == "fp16",
        lambda recipe: (
            "backend.dtype: fp16 for ONNX Runtime is not built yet; set bf16, which Gemma was trained in and a GPU "
            "computes as fast, fp32 or int8 for a CPU, or backend.type: tvm_vacc"
        ),
    ),
    (
        lambda recipe: recipe.onnxruntime and recipe.int8_cache,
        lambda recipe: (
            "frontend.quantize.type: an int8 cache for ONNX Runtime is not built yet; "
            "leave out +kv8, or set backend.type: tvm_vacc"
        ),
    ),
    (
        lambda recipe: recipe.onnxruntime and (recipe.ranks > 1 or bool(recipe.split_points)),
        lambda recipe: (
            "split.points and model_kwargs.tp: ONNX Runtime's graph is not divided; "
            "remove them, or set backend.type: tvm_vacc"
        ),
    ),
    (
        lambda recipe: not recipe.backend.merge_params,
        lambda recipe: (
            "backend.merge_params: separate parameter files are not built yet; "
            "both graphs share params.safetensors, so set merge_params: true"
        ),
    ),
)


def check_built(recipe: Recipe) -> None:
    """Refuse what the recipe asks for and this version does not do.

    Raises:
        NotBuiltError: one sentence for each such key.
    """
    problems = [explain(recipe) for asked, explain in _NOT_BUILT if asked(recipe)]
    if problems:
        raise NotBuiltError(
            "the recipe is valid, but asks for what this version does not do",
            where=f"recipe {recipe.name}",
            problems=problems,
            next_step="change the keys above in the recipe, or on the command line with -s KEY=VALUE",
        )
