"""What the keys of a recipe mean to the rest of the program, which never sees a recipe."""

from __future__ import annotations

from gemma_deploy.backends import backend
from gemma_deploy.backends.spec import BuildSpec, read_options
from gemma_deploy.recipe.sections import RecipeSections
from gemma_deploy.schemes import Scheme


def scheme_of(recipe: RecipeSections) -> Scheme:
    """How weights and cache are kept."""
    quantize = recipe.frontend.quantize
    return Scheme.parse(recipe.backend.dtype, None if quantize is None else quantize.type)


def spec_of(recipe: RecipeSections) -> BuildSpec:
    """What is to be built.

    Raises:
        ValidationError: `backend.compile` holds what the back end does not know; reading.py has refused it before.
    """
    chosen, quantize, kwargs = backend(recipe.backend.type), recipe.frontend.quantize, recipe.frontend.model_kwargs
    args = None if quantize is None else quantize.calib_args
    keep = None if args is None or args.keep_w8 is None else tuple(args.keep_w8)
    return BuildSpec(
        backend=recipe.backend.type,
        options=read_options(chosen.options, recipe.backend.compile),
        scheme=scheme_of(recipe),
        prefill=recipe.prefill_length,
        context=recipe.context_length,
        batch=recipe.frontend.shape.batch,
        dynamic=recipe.frontend.shape.dynamic,
        split_points=tuple(recipe.split.points),
        ranks=kwargs.tp,
        align_qkv=kwargs.align_qkv,
        b2s=kwargs.b2s,
        embed_scale=kwargs.embed_scale,
        groupsize=None if args is None else args.groupsize,
        table=None if quantize is None else quantize.table,
        per_layer_table=None if quantize is None else quantize.per_layer_table,
        keep_w8=keep,
        code_defaults=chosen.code_defaults,
        adapter_rank=None if recipe.adapters is None else recipe.adapters.rank,
    )
