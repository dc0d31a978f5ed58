"""`gemma-deploy split`: where to cut a model, and the parts as directories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.errors import UsageError
from gemma_deploy.options import NAME, PATH, adapter_option

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import AdapterRef

EPILOG = """\b
Examples:
  gemma-deploy split /models/gemma-2b                          # points that balance the bytes
  gemma-deploy split /models/gemma-2b parts/gemma-2b --points 6,12
  gemma-deploy split /models/gemma-2b parts/gemma-2b --parts 4
"""
GB = 1e9


def _points(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(point) for point in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of layer numbers such as 6,12") from None


@click.command("split", epilog=EPILOG)
@click.argument("checkpoint", type=NAME)
@click.argument("out", type=PATH, required=False)
@click.option("--points", callback=_points, metavar="A,B", help="Layers that begin a new part.")
@click.option("--parts", type=click.IntRange(2), help="Choose points that balance the bytes of this many parts.  [3]")
@adapter_option("Added to the weights before they are cut.")
@click.option("--force", is_flag=True, help="Replace a split model made before.")
@click.option("--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Tensors written at a time.")
def command(
    checkpoint: str,
    out: Path | None,
    points: tuple[int, ...] | None,
    parts: int | None,
    adapter: tuple[AdapterRef, ...],
    force: bool,
    workers: int,
) -> None:
    """Cut CHECKPOINT (a directory, a .gguf file, or `demo`) into bottom, trunk and top; write them into OUT."""
    from rich.table import Table

    from gemma_deploy import extras
    from gemma_deploy.checkpoint import Checkpoint
    from gemma_deploy.partition import recommended_points, span_bytes, spans_of
    from gemma_deploy.progress import BYTES, shown
    from gemma_deploy.tables import console
    from gemma_deploy.workdir import refuse_directory

    if points is not None and parts is not None:
        raise UsageError("--points and --parts say the same in two ways", next_step="keep one of them")
    if out is not None:
        extras.require("build", what="writing parts")
        refuse_directory(out, "OUT")
    opened = Checkpoint.open(checkpoint, adapter)
    config = opened.config
    sizes = {name: info.nbytes for name, info in opened.tensors.items()}
    chosen = points if points is not None else recommended_points(config, parts or 3, sizes)
    spans = spans_of(config.num_hidden_layers, chosen)
    if out is not None:
        from gemma_deploy.split.writing import write_split

        with shown("parts", BYTES) as tick:
            write_split(opened, spans, out, force=force, workers=workers, progress=tick)
    table = Table("part", "layers", "GB", title=f"split points {','.join(map(str, chosen))}")
    for span in spans:
        size = f"{span_bytes(config, span, sizes) / GB:.3f}"
        table.add_row(span.name, f"{span.start} to {span.stop - 1}", size)
    console().print(table)
    if out is not None:
        click.echo(f"split  {out}")
