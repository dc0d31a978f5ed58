"""`gemma-deploy merge`: a checkpoint with adapters added, as a checkpoint that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.names import GIB, MIB
from gemma_deploy.options import NAME, PATH, adapter_option

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import AdapterRef

EPILOG = """\b
Examples:
  gemma-deploy merge /models/gemma-2b my-lora merged/gemma-2b-mine
  gemma-deploy merge /models/gemma-2b my-lora:0.5 merged/half --adapter other-lora:0.5
  gemma-deploy merge demo my-lora merged/demo --dtype fp32
"""


@click.command("merge", epilog=EPILOG)
@click.argument("checkpoint", type=NAME)
@click.argument("first", type=NAME, metavar="ADAPTER")
@click.argument("out", type=PATH)
@adapter_option("One more, added after ADAPTER.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="[default: the checkpoint's own]")
@click.option("--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Tensors written at a time.")
def command(
    checkpoint: str, first: str, out: Path, adapter: tuple[AdapterRef, ...], dtype: str | None, workers: int
) -> None:
    """Write CHECKPOINT (a directory, a .gguf file, or `demo`) with ADAPTER added into OUT.

    ADAPTER is a directory that peft wrote, or DIR:WEIGHT. Memory does not grow with the model.
    """
    import time

    from gemma_deploy import extras
    from gemma_deploy.checkpoint import AdapterRef, resolve_checkpoint
    from gemma_deploy.machine import peak_rss_bytes
    from gemma_deploy.progress import BYTES, shown
    from gemma_deploy.workdir import refuse_directory

    refuse_directory(out, "OUT")
    extras.require("build", what="`gemma-deploy merge`")
    from gemma_deploy.merging import merge

    started = time.perf_counter()
    refs = (AdapterRef.parse(first), *adapter)
    with shown("merge", BYTES) as tick:
        merged = merge(resolve_checkpoint(checkpoint), refs, out, dtype=dtype, workers=workers, progress=tick)
    for note in merged.notes:
        click.echo(f"note: {note}")
    seconds, peak = time.perf_counter() - started, peak_rss_bytes() / MIB
    files = f"{len(merged.shards)} file{'s' if len(merged.shards) > 1 else ''} of {merged.dtype}"
    click.echo(f"{merged.nbytes / GIB:.2f} GiB in {files}  {seconds:.1f} s  peak {peak:.0f} MiB")
    click.echo(f"merged  {merged.path}")
