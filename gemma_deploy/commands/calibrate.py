"""`gemma-deploy calibrate`: tokenized samples and activation ranges of a checkpoint on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.options import NAME, PATH, adapter_option

if TYPE_CHECKING:
    from gemma_deploy.calibration.pipeline import Request
    from gemma_deploy.calibration.store import Calibration
    from gemma_deploy.checkpoint import AdapterRef
    from gemma_deploy.recipe import Recipe

PER_KIND = 2  # rows of the table for each kind of point
# (windows, tokens): of a user's file as in docs/design.md 4.1; the bundled samples are smaller, and so is the demo's
# context.
OF_A_FILE, OF_THE_SAMPLE = (128, 1024), (32, 128)
EPILOG = """\b
Examples:
  gemma-deploy calibrate --dataset c4
  gemma-deploy calibrate --dataset c4 --path c4-train.00000-of-01024.json.gz --checkpoint /models/gemma-2b
  gemma-deploy calibrate --dataset ceval --path ceval-exam.zip --nsamples 64 --seqlen 512
  gemma-deploy calibrate --dataset c4:64,ceval:32,alpaca:32 --path ceval=ceval-exam.zip,c4=c4.json.gz
  gemma-deploy calibrate --dataset c4 --path hub:allenai/c4
  gemma-deploy calibrate --dataset alpaca --recipe cpu-int8 --seed 1
"""


@click.command("calibrate", epilog=EPILOG)
@click.option(
    "--dataset",
    type=NAME,
    metavar="NAME[:N,...]",
    help="c4, ceval or alpaca, or a mix of them with the windows of each; without --recipe needed.",
)
@click.option(
    "--path",
    type=NAME,
    metavar="PLACE",
    help="A file, or hub to stream it; in a mix NAME=PLACE,NAME=PLACE  [default: the bundled samples]",
)
@click.option("--recipe", type=NAME, metavar="FILE|NAME", help="Take checkpoint, data set and workspace from a recipe.")
@click.option(
    "--checkpoint", type=NAME, metavar="PATH", help="Directory, .gguf or `demo`  [default: the recipe's, or demo]"
)
@adapter_option("Added to the weights, instead of the recipe's adapter.")
@click.option("--nsamples", type=click.IntRange(min=1), help="Windows  [default: 128; 32 of the bundled sample]")
@click.option(
    "--seqlen",
    type=click.IntRange(min=2),
    help="Tokens in each, BOS too  [default: 1024 or what the model takes; 128 of the sample]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Order of the texts.")
@click.option("--workspace", type=PATH, help="Results go to WORKSPACE/calib/  [default: workspace]")
@click.option("--force", is_flag=True, help="Measure again what has been measured before.")
def command(
    dataset: str | None,
    path: str | None,
    recipe: str | None,
    checkpoint: str | None,
    adapter: tuple[AdapterRef, ...],
    nsamples: int | None,
    seqlen: int | None,
    seed: int,
    workspace: Path | None,
    force: bool,
) -> None:
    """Tokenize samples of a data set and measure the range of every activation of the model on them."""
    import time

    from gemma_deploy import extras
    from gemma_deploy.calibration.pipeline import calibrate
    from gemma_deploy.checkpoint import Checkpoint
    from gemma_deploy.machine import peak_rss_bytes
    from gemma_deploy.progress import shown
    from gemma_deploy.recipe import Recipe
    from gemma_deploy.workdir import refuse_directory

    if dataset is None and recipe is None:
        raise click.UsageError("Missing option '--dataset' (or '--recipe'). Choose from: c4, ceval, alpaca")
    extras.require("build", "calibrate", what="`gemma-deploy calibrate`")
    started = time.perf_counter()
    loaded = Recipe.load(recipe, checkpoint=checkpoint, adapters=adapter) if recipe else None
    source = Checkpoint.open(
        checkpoint or (loaded.frontend.checkpoint if loaded else "demo"), loaded.merged_adapters if loaded else adapter
    )
    request = _request(loaded, dataset, path, nsamples, seqlen, seed, source.config.max_position_embeddings)
    place = workspace or Path(loaded.workspace.path if loaded else "workspace")
    refuse_directory(place / "calib", "--workspace")
    with shown("calibrate", "windows through layers") as tick:
        outcome = calibrate(
            source,
            request,
            place,
            force=force,
            progress=tick,
            processes=loaded.workspace.processes if loaded else 1,
            cluster=loaded.workspace.cluster if loaded else None,
        )
    if outcome.reused:
        click.echo("nothing has changed: measured before (--force measures again)")
    _print_table(outcome.calibration)
    seconds, peak = time.perf_counter() - started, peak_rss_bytes() / (1 << 20)
    click.echo(f"{request.nsamples} windows of {request.seqlen} tokens  {seconds:.1f} s  peak {peak:.0f} MiB")
    click.echo(f"calibration  {outcome.calibration.path}")


def _request(
    recipe: Recipe | None,
    dataset: str | None,
    path: str | None,
    nsamples: int | None,
    seqlen: int | None,
    seed: int,
    context: int,
) -> Request:
    """Options first, then what the recipe spells out, then defaults that fit the file and the model's context."""
    from gemma_deploy.calibration.mix import read_mix
    from gemma_deploy.calibration.pipeline import Request

    section = recipe.dataset if recipe else None
    name = dataset or (section.name if section else "c4")
    if path is None and section is not None and section.path is not None and section.name == name:
        path = section.path
    mix = read_mix(name, path)
    defaults = OF_THE_SAMPLE if any(part.place is None for part in mix.parts) else OF_A_FILE
    spelled = section.model_fields_set if section is not None else set()
    if nsamples is None:
        of_recipe = section.nsamples if section is not None and "nsamples" in spelled else None
        nsamples = mix.windows or of_recipe or defaults[0]
    if section is not None and seqlen is None and "seqlen" in spelled:
        seqlen = section.seqlen
    embed_scale = recipe.frontend.model_kwargs.embed_scale if recipe else "exact"
    return Request(name, path, nsamples, seqlen or min(defaults[1], context), seed, embed_scale)


def _print_table(calibration: Calibration) -> None:
    from rich.table import Table

    from gemma_deploy.calibration.picture import largest
    from gemma_deploy.tables import console

    table = Table(title=f"largest ranges, {PER_KIND} of each kind of {len(calibration.ranges)} points")
    table.add_column("point", overflow="fold")
    for heading in ("absmax", "channel", "x median channel", "fp16 headroom"):
        table.add_column(heading, justify="right")
    for row in largest(calibration.ranges, PER_KIND):
        table.add_row(row.point, _number(row.absmax), str(row.channel), _number(row.outlier), _number(row.headroom))
    console().print(table)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
