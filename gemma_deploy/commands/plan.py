"""`gemma-deploy plan`: what fits on a device, how fast it may be, and the recipe to start with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy import backends
from gemma_deploy.options import NAME, PATH
from gemma_deploy.planning import PRECISIONS

if TYPE_CHECKING:
    from gemma_deploy.planning.device import Device

EPILOG = """\b
Examples:
  gemma-deploy plan /models/gemma-2b                            # on this machine, which is measured first
  gemma-deploy plan /models/gemma-2-27b --device gpu-80gb --context 8192 --batch 16
  gemma-deploy plan demo --device laptop --write mine.yaml      # then: gemma-deploy compile mine.yaml
  gemma-deploy plan --measure here.yaml                         # a device file of this machine
  gemma-deploy plan /models/gemma-2b --device here.yaml --json plan.json

Devices that come with the program: card-16gb, gpu-80gb, laptop, two-cores, vastai-4-dies. No weight is read. Sizes are
those of the parameter file; speeds are predicted: docs/plan.md says from what, and how well.
"""


@click.command("plan", epilog=EPILOG)
@click.argument("checkpoint", type=NAME, required=False)
@click.option("--device", type=NAME, metavar="FILE", help="A device file, or the name of a shipped one.")
@click.option("--measure", type=PATH, metavar="FILE", help="Measure this machine and write a device file there.")
@click.option("--prompt", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of the longest prompt.")
@click.option("--context", type=click.IntRange(2), default=2048, show_default=True, help="Positions of the cache.")
@click.option("--batch", type=click.IntRange(1, 4096), default=1, show_default=True, help="Texts at a time.")
@click.option("--backend", type=click.Choice(backends.ROWS), multiple=True, help="Only this one. Repeatable.")
@click.option("--precision", type=click.Choice(PRECISIONS), multiple=True, help="Only this one. Repeatable.")
@click.option("--write", type=PATH, metavar="FILE", help="Write the recipe to start with there.")
@click.option("--json", "json_file", type=PATH, help="Write the plan there.")
def command(
    checkpoint: str | None,
    device: str | None,
    measure: Path | None,
    prompt: int,
    context: int,
    batch: int,
    backend: tuple[str, ...],
    precision: tuple[str, ...],
    write: Path | None,
    json_file: Path | None,
) -> None:
    """Say what CHECKPOINT (a directory, a .gguf file, or `demo`) takes on a device in every precision."""
    from gemma_deploy.errors import DeployError, UsageError
    from gemma_deploy.planning import shown
    from gemma_deploy.planning.choices import Wanted, longest
    from gemma_deploy.reading import refuse_output
    from gemma_deploy.tables import console, table_of
    from gemma_deploy.writing import finite, write_json, write_text

    if checkpoint is None and measure is None:
        raise click.UsageError("name a CHECKPOINT, or measure this machine: --measure FILE")
    if device is not None and measure is not None:
        raise click.UsageError("--device and --measure name two devices: keep one")
    if checkpoint is None and (write is not None or json_file is not None):
        raise click.UsageError("--write and --json are of a plan: name a CHECKPOINT")
    if prompt > context:
        raise click.UsageError(f"--prompt {prompt} is longer than --context {context}")
    for file, option in ((measure, "--measure"), (write, "--write"), (json_file, "--json")):
        if file is not None:
            refuse_output(file, option)
    found = _device(device, measure)
    if checkpoint is None:
        return
    from gemma_deploy.checkpoint import Checkpoint
    from gemma_deploy.planning.planner import make_plan

    if unknown := [name for name in backend if name not in found.backends]:
        raise UsageError(
            f"{', '.join(unknown)} is no back end of {found.name}",
            expected=f"one of {', '.join(found.backends)}",
            next_step="name one of these, or another device",
        )
    opened = Checkpoint.open(checkpoint)
    wanted = longest(opened.config.max_position_embeddings, Wanted(prompt, context, batch))
    if wanted.context < context:
        click.echo(f"note: the model was made for {wanted.context} positions, and no more are planned for", err=True)
    plan = make_plan(opened, found, wanted, backends=backend, precisions=precision)
    console().print(table_of(shown.HEADINGS, shown.table_rows(plan), words=("devices",)))
    for line in shown.lines(plan):
        click.echo(line)
    if json_file is not None:
        write_json(json_file, finite(shown.to_json(plan)), sort_keys=False)
    if plan.proposed is None:
        raise DeployError(f"nothing fits on {found.name}", where=checkpoint, next_step="see the lines above")
    if write is not None:
        write_text(write, shown.recipe_of(plan))
        click.echo(f"recipe  {write}")


def _device(asked: str | None, measure: Path | None) -> Device:
    """The device file that is named, or this machine, measured."""
    from gemma_deploy.machine import Machine
    from gemma_deploy.planning.device import Device
    from gemma_deploy.planning.measure import measure_machine
    from gemma_deploy.writing import write_text

    if asked is not None:
        return Device.load(asked)
    machine = Machine.measure(measure or Path())
    found = measure_machine(machine, lambda line: click.echo(f"measuring  {line}", err=True))
    if measure is not None:
        write_text(measure, found.to_yaml())
        click.echo(f"device  {measure}")
    if machine.is_busy:
        click.echo(f"the load average is {machine.load:.1f}: other programs run, and these rates are too low", err=True)
    return found
