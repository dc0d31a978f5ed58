"""`gemma-deploy recipes`: the built-in recipes, what each is for and what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gemma_deploy.recipe import Recipe
    from gemma_deploy.recipe.catalogue import Shipped

EPILOG = """\b
Examples:
  gemma-deploy recipes
  gemma-deploy recipes cpu-best-int8 > mine.yaml   # to change it
  gemma-deploy compile cpu-int8                    # a name is enough

`compile` and `calibrate` take these names in any folder; name a file by its path or suffix (mine.yaml).
"""
INDENT = "    "
CHECKPOINT = "GEMMA_CHECKPOINT"  # what the shipped recipes ask the environment for
WIDTH = 2048  # columns of a matrix, for the share of its scales


@click.command("recipes", epilog=EPILOG)
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the built-in recipes, or print the text of NAME."""
    from gemma_deploy import reading
    from gemma_deploy.recipe.catalogue import find_recipe, shipped_recipes
    from gemma_deploy.recipe.recipe import RECIPE_FILE

    if name is not None:
        click.echo(reading.read_text(find_recipe(name), RECIPE_FILE, pipes=True), nl=False)
        return
    for shipped in shipped_recipes():
        click.echo("\n".join([shipped.name, *map(_wrapped, (shipped.goal, *_facts(shipped)))]) + "\n")
    click.echo("compile one:  gemma-deploy compile NAME --checkpoint /models/gemma-3-270m -s name=gemma-3-270m-int8")
    click.echo("see one:      gemma-deploy recipes NAME")


def _wrapped(line: str) -> str:
    from gemma_deploy.tables import console

    return click.wrap_text(line, min(console().width, 120), INDENT, INDENT)


def _facts(shipped: Shipped) -> tuple[str, ...]:
    """What the recipe's keys say: back end, weights and their size, what it needs."""
    from gemma_deploy.errors import RecipeError
    from gemma_deploy.recipe import Recipe

    recipe = Recipe.load(shipped.file, env={CHECKPOINT: "demo"})
    needs = ["a checkpoint"]
    try:
        if Recipe.load(shipped.file, env={}).frontend.checkpoint == "demo":
            needs = ["nothing (the bundled demo model), or a checkpoint"]
    except RecipeError:  # it has no default
        pass
    if recipe.scheme.calibrates:
        needs.append("calibration text (a bundled sample unless dataset.path names yours)")
    if recipe.spec.ranks > 1:
        needs.append(f"{recipe.spec.ranks} devices")
    low, high = _bytes_per_weight(recipe)
    size = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
    made = f"back end {recipe.backend.type}, weights {recipe.scheme}, about {size} GB for a billion of them"
    made += f"; a context of {recipe.spec.context} tokens"
    former = (f"before: {shipped.former}, which still works",) if shipped.former else ()
    return (made, f"needs {', '.join(needs)}", *former)


def _bytes_per_weight(recipe: Recipe) -> tuple[float, float]:
    """Of linears and token table, scales included; from the smallest to the largest where they differ."""
    if not recipe.scheme.codes:
        size = 4.0 if recipe.scheme.weights == "fp32" else 2.0
        return size, size
    storage = recipe.spec.storage(WIDTH)
    codes = [storage.linears, storage.linear(storage.kept_w8[0]) if storage.kept_w8 else storage.linears]
    codes += [storage.table] if storage.table else []
    sizes = [one.bits / 8 + 4 / (one.groupsize or WIDTH) for one in codes]
    return min(sizes), max(sizes)
