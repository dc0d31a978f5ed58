"""`gemma-deploy compile`: a recipe becomes a verified artifact."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.names import MIB
from gemma_deploy.options import NAME, PATH, adapter_option

if TYPE_CHECKING:
    from gemma_deploy.artifact.gate_rows import Result
    from gemma_deploy.checkpoint import AdapterRef
    from gemma_deploy.stages.clock import StageTiming

log = logging.getLogger(__name__)
EPILOG = """\b
Examples:
  gemma-deploy compile cpu-int8
  gemma-deploy compile cpu-int8 --checkpoint /models/gemma-2b --dry-run
  gemma-deploy compile accelerator-fp16 -s frontend.shape.input_ids=[[256],[512]] -s name=mine
  gemma-deploy compile accelerator-fp32 --dynamic
  gemma-deploy compile cpu-int8 --checkpoint /models/gemma-2b --adapter my-lora
"""


@click.command("compile", epilog=EPILOG)
@click.argument("recipe")
@click.option("-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
@click.option("--checkpoint", type=NAME, metavar="PATH", help="Directory, .gguf or `demo`, instead of the recipe's.")
@adapter_option("Added to the weights, instead of the recipe's adapter.")
@click.option("--dynamic", is_flag=True, help="Free batch and lengths: short for -s frontend.shape.dynamic=true.")
@click.option("--out", type=PATH, help="Artifact directory  [default: workspace.path/NAME]")
@click.option("--force", is_flag=True, help="Replace an artifact made from other inputs.")
@click.option(
    "--dry-run", is_flag=True, help="Check everything, show memory, disk and time of every stage; do nothing."
)
@click.option("--parity/--no-parity", default=True, help="Run the gate at the end.  [default: parity]")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    checkpoint: str | None,
    adapter: tuple[AdapterRef, ...],
    dynamic: bool,
    out: Path | None,
    force: bool,
    dry_run: bool,
    parity: bool,
) -> None:
    """Compile RECIPE, a YAML file or a name that `gemma-deploy recipes` lists.

    Exit 1 when the artifact does not compute the model.
    """
    from gemma_deploy import compile as compiler
    from gemma_deploy.errors import PreflightError
    from gemma_deploy.preflight import render
    from gemma_deploy.progress import watch_on
    from gemma_deploy.recipe import Recipe
    from gemma_deploy.tables import console

    overrides += ("frontend.shape.dynamic=true",) if dynamic else ()
    loaded = Recipe.load(recipe, overrides, checkpoint=checkpoint, adapters=adapter)
    if loaded.vendor_keys():
        log.debug("carried for the vendor's compiler, not interpreted here: %s", ", ".join(loaded.vendor_keys()))
    if dry_run:
        plan = compiler.plan_recipe(loaded, out=out, parity=parity, force=force)
        console().print(render(plan))
        if plan.shortfalls:
            raise PreflightError(
                "this machine cannot do the job as asked",
                where=f"recipe {loaded.name}",
                next_step="see the lines above that begin with short:",
            )
        return
    result = compiler.compile_recipe(
        loaded,
        out=out,
        force=force,
        parity=parity,
        on_stage=_print_stage,
        on_gate=_print_gate,
        watcher=watch_on(sys.stderr),
    )
    if result.reused:
        click.echo(f"nothing has changed: {result.path} is up to date")
        if result.parity is not None:
            _print_gate(result.parity)
    if result.parity is None:
        click.echo("parity  not run: nothing is proven")
    click.echo(f"artifact  {result.path}")


def _print_gate(result: Result) -> None:
    from gemma_deploy.artifact.gate_rows import HEADINGS, WORDS, gate_rows, headline
    from gemma_deploy.tables import console, table_of

    console().print(table_of(HEADINGS, gate_rows(result.lines), title="gate", words=WORDS))
    click.echo(f"parity  {headline(result)}")


def _print_stage(stage: StageTiming) -> None:
    size = f"{stage.bytes / MIB:10.1f} MiB" if stage.bytes else " " * 14
    done = "  (failed)" if stage.failed else "  (was done)" if stage.skipped else ""
    click.echo(f"{stage.name:<11}{stage.seconds:8.2f} s  peak {stage.peak_rss_bytes / MIB:7.0f} MiB {size}{done}")
