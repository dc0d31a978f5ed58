"""`gemma-deploy stage`: a directory that `from_pretrained(..., trust_remote_code=True)` loads as the patched model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.options import NAME, PATH, adapter_option

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import AdapterRef

EPILOG = """\b
Examples:
  gemma-deploy stage /models/gemma-2b staged/gemma-2b
  python -c "from transformers import AutoModelForCausalLM as A;
             A.from_pretrained('staged/gemma-2b', trust_remote_code=True)"
"""


@click.command("stage", epilog=EPILOG)
@click.argument("checkpoint", type=NAME)
@click.argument("out", type=PATH)
@adapter_option("Added to the weights, which are then written as float32.")
@click.option("--force", is_flag=True, help="Replace a directory staged before.")
def command(checkpoint: str, out: Path, adapter: tuple[AdapterRef, ...], force: bool) -> None:
    """Link the weights of CHECKPOINT (a directory, a .gguf file, or `demo`) into OUT beside the patched files."""
    from gemma_deploy.checkpoint import resolve_checkpoint
    from gemma_deploy.progress import BYTES, shown
    from gemma_deploy.staging import stage_checkpoint
    from gemma_deploy.workdir import refuse_directory

    refuse_directory(out, "OUT")
    with shown("stage", BYTES) as tick:
        staged = stage_checkpoint(resolve_checkpoint(checkpoint), out, adapter=adapter, force=force, progress=tick)
    click.echo(f"staged {staged}")
