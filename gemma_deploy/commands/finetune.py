"""`gemma-deploy finetune`: LoRA, QLoRA or full training on a file of examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.options import NAME

if TYPE_CHECKING:
    from gemma_deploy.finetune.result import FinetuneResult

# Options that are fields of SFTConfig under another name.
SHORT = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch": "per_device_train_batch_size",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "packing": "packing",
}
OF_LORA = ("r", "alpha", "dropout", "targets")
EPILOG = """\b
Examples:
  gemma-deploy finetune --checkpoint /models/gemma-3-270m --data alpaca.json --out tuned
  gemma-deploy finetune --checkpoint /models/gemma-2b --data quotes.jsonl --field quote --r 32 --alpha 16 --out tuned
  gemma-deploy finetune --checkpoint demo --data chat.jsonl --eval-data held.jsonl --patience 3 --out tuned
  gemma-deploy finetune --checkpoint /models/gemma-2b --data chat.jsonl --method qlora --out tuned
  gemma-deploy finetune --checkpoint demo --data chat.jsonl --out tuned --steps 200 --set optim=adafactor
  gemma-deploy finetune RECIPE.yaml
"""


@click.command("finetune", epilog=EPILOG)
@click.argument("recipe", required=False)
@click.option(
    "--checkpoint", type=NAME, metavar="PATH", help="Directory, .gguf file or `demo`  [default: the recipe's]"
)
@click.option("--data", type=NAME, metavar="FILE", help="What is learned: JSONL, or a JSON list.")
@click.option(
    "--base", type=NAME, metavar="ARTIFACT", help="Train LoRA on the int8 codes of an artifact of the checkpoint."
)
@click.option("--out", type=NAME, metavar="DIR", help="Where adapter, report and figures go.")
@click.option("--method", type=click.Choice(["lora", "qlora", "full"]), help="[default: lora]")
@click.option("--field", metavar="KEY", help="The key that holds the text of an example  [default: text]")
@click.option(
    "--format", "data_format", type=click.Choice(["auto", "text", "messages", "alpaca", "prompt"]), help="[auto]"
)
@click.option("--loss", type=click.Choice(["answers", "all"]), help="Tokens that are learned  [default: answers]")
@click.option("--max-length", type=click.IntRange(2), help="Tokens of an example at most  [default: 1024]")
@click.option("--too-long", type=click.Choice(["cut", "refuse"]), help="What becomes of longer ones  [default: cut]")
@click.option("--eval-data", type=NAME, metavar="FILE", help="Held-out examples  [default: a part of the data]")
@click.option("--validation", type=click.FloatRange(0), help="The part: a share below 1, or a number  [default: 0.05]")
@click.option("--patience", type=click.IntRange(1), help="End after so many evaluations without a better loss.")
@click.option("--model", type=click.Choice(["stock", "patched"]), help="Class that is trained  [default: stock]")
@click.option("--r", type=click.IntRange(1), help="Rank of the adapter  [default: 16]")
@click.option("--alpha", type=float, help="Its scale is alpha / r  [default: 32]")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="In front of the adapter  [default: 0]")
@click.option("--targets", metavar="NAME,...", help="Linears that get one  [default: all seven kinds]")
@click.option("--steps", type=click.IntRange(1), help="Updates; otherwise epochs count.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Times through the data  [default: 3]")
@click.option("--batch", type=click.IntRange(1), help="Examples at a time  [default: 8]")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="[default: 2e-4, full 2e-5]")
@click.option("--seed", type=click.IntRange(0), help="[default: 42]")
@click.option("--packing", is_flag=True, default=None, help="Several examples in a row, none of which sees another.")
@click.option("--devices", type=click.IntRange(1), help="Processes that train together  [default: 1]")
@click.option("--accelerate-config", type=NAME, metavar="FILE", help="From `accelerate config`: DDP, FSDP, DeepSpeed.")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A field of TRL's SFTConfig; repeatable.")
@click.option("--dry-run", is_flag=True, help="Check data, settings, memory and disk, and stop.")
def command(recipe: str | None, checkpoint: str | None, pairs: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Fine-tune CHECKPOINT on the examples of FILE with TRL and PEFT; options go before RECIPE's section `finetune`.

    OUT gets adapter/ (PEFT's files; model/ after a full training), report.html and run.json. Killed at any moment, the
    same command goes on.
    """
    from gemma_deploy import extras
    from gemma_deploy.finetune.run import finetune
    from gemma_deploy.progress import shown

    extras.require("build", "finetune", what="`gemma-deploy finetune`")
    loaded = _recipe(recipe, checkpoint)
    base = checkpoint or (loaded.frontend.checkpoint if loaded else None)
    if base is None:
        raise click.UsageError("Missing option '--checkpoint' (or a RECIPE that names one).")
    settings = _settings(loaded, pairs, options)
    with shown("finetune", "steps") as tick:
        result = finetune(settings, base, recipe=recipe or "RECIPE", dry_run=dry_run, progress=tick)
    _show(result, dry_run, recipe or "RECIPE")


def _recipe(recipe: str | None, checkpoint: str | None) -> Any:
    from gemma_deploy.recipe import Recipe

    return None if recipe is None else Recipe.load(recipe, checkpoint=checkpoint)


def _settings(loaded: Any, pairs: tuple[str, ...], options: dict[str, Any]) -> Any:
    """The recipe's section with the options in the place of its keys."""
    from gemma_deploy.finetune.arguments import read_pairs
    from gemma_deploy.finetune.settings import FinetuneSettings, settings_of

    section = loaded.finetune if loaded and loaded.finetune is not None else FinetuneSettings()
    values = section.model_dump()
    given = {name: value for name, value in options.items() if value is not None}
    if "targets" in given:
        given["targets"] = [name.strip() for name in given["targets"].split(",") if name.strip()]
    if "data_format" in given:
        given["format"] = given.pop("data_format")
    values["lora"] |= {name: given.pop(name) for name in OF_LORA if name in given}
    values["sft"] |= {field: given.pop(name) for name, field in SHORT.items() if name in given} | read_pairs(pairs)
    return settings_of({**values, **given}, where="finetune", next_step="see `gemma-deploy finetune --help`")


def _show(result: FinetuneResult, dry_run: bool, recipe: str) -> None:
    from gemma_deploy.finetune.report import command as compile_command
    from gemma_deploy.finetune.report import perplexity
    from gemma_deploy.machine import gib, size
    from gemma_deploy.tables import figure

    click.echo(f"data  {result.examples}")
    if result.held_out is not None:
        click.echo(f"held out  {result.held_out}")
    click.echo(f"memory  about {gib(result.memory.total)}: {result.memory}")
    click.echo(f"disk  about {size(result.room.total)}: {result.room}")
    if dry_run:
        click.echo("this machine can do it; nothing has been written")
        return
    outcome = result.outcome
    if outcome is not None:
        if outcome.resumed:
            click.echo(f"went on after step {outcome.resumed}")
        click.echo(f"{outcome.steps} steps in {figure(outcome.seconds)} s, peak {gib(outcome.peak_rss_bytes)}")
        if outcome.loss_before is not None:
            before, after = perplexity(outcome.loss_before), perplexity(outcome.loss_after)
            click.echo(f"held-out perplexity  {figure(before)} before, {figure(after)} after")
    click.echo(f"report  {Path(result.path) / 'report.html'}")
    if outcome is not None and outcome.loss_merged is not None:
        click.echo(f"merged and quantized again it would be {figure(perplexity(outcome.loss_merged))}")
    click.echo(f"{'run' if result.base else 'compile'} it with\n  {compile_command(result, recipe)}")
