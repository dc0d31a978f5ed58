"""`gemma-deploy adapter`: keep a LoRA adapter in an artifact, in the form that its runtime loads."""

from __future__ import annotations

from pathlib import Path

import click

from gemma_deploy.options import NAME, PATH

EPILOG = """\b
Examples:
  gemma-deploy adapter workspace/NAME runs/pirate/adapter --name pirate
  gemma-deploy chat workspace/NAME --adapter pirate --adapter runs/poet/adapter

The artifact's recipe says `adapters: {rank: N}` (backend.type onnxruntime). What cannot stay beside an artifact (DoRA,
modules_to_save, LoRA of the token table) is merged: gemma-deploy compile RECIPE --adapter ADAPTER_DIR.
"""


@click.command("adapter", epilog=EPILOG)
@click.argument("artifact", type=PATH)
@click.argument("adapter_dir", type=PATH)
@click.option(
    "--name", type=NAME, metavar="NAME", help="What it is called  [default: the directory's name and its fingerprint]"
)
@click.option("--force", is_flag=True, help="Replace another adapter of that name.")
def command(artifact: Path, adapter_dir: Path, name: str | None, force: bool) -> None:
    """Keep the adapter in ADAPTER_DIR, which peft's save_pretrained wrote, in ARTIFACT as adapters/NAME.

    It is checked against the artifact's model and never merged: `run` and `chat` load it with --adapter NAME, and
    `chat` changes it without loading the model again.
    """
    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.backends import backend_of
    from gemma_deploy.engine import refuse_encoder
    from gemma_deploy.names import MIB

    opened = open_whole(artifact, hashes=True)
    refuse_encoder(opened)
    kept = backend_of(opened.manifest).keep_adapter(opened, adapter_dir, name, force=force)
    found = kept.record
    size = f"{found.file.bytes / MIB:.1f} MiB"
    click.echo(f"adapter   {kept.name}: rank {found.rank}, {found.linears} linears, {size}, from {found.source}")
    click.echo(f"kept      {kept.path}")
