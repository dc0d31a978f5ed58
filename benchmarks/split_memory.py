"""Peak RSS of loading one part of a checkpoint, beside the part's own bytes.

    python benchmarks/split_memory.py CHECKPOINT [--points 6,12] [--part trunk]

Limit (issue "Every Gemma generation"): own bytes + 0.6 GiB, of which importing torch takes about 0.35.
"""

from __future__ import annotations

import json

import click

GIB = 1 << 30


@click.command()
@click.argument("checkpoint")
@click.option("--points", default="6,12", show_default=True)
@click.option("--part", default="trunk", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(checkpoint: str, points: str, part: str, as_json: bool) -> None:
    """Load PART of CHECKPOINT in this process and print what it took."""
    from gemma_deploy.checkpoint import Checkpoint
    from gemma_deploy.machine import peak_rss_bytes
    from gemma_deploy.partition import spans_of
    from gemma_deploy.split import from_pretrained_split

    opened = Checkpoint.open(checkpoint)
    spans = spans_of(opened.config.num_hidden_layers, [int(point) for point in points.split(",")])
    before = peak_rss_bytes()
    loaded = from_pretrained_split(opened, next(span for span in spans if span.name == part))
    own = sum(value.nbytes for value in loaded.parameters())
    peak = peak_rss_bytes()
    if as_json:
        click.echo(json.dumps({"own_bytes": own, "peak_rss_bytes": peak}))
        return
    click.echo(
        f"{part}: {own / GIB:.2f} GiB of parameters, peak RSS {peak / GIB:.2f} GiB "
        f"(own + {(peak - own) / GIB:.2f} GiB; {before / GIB:.2f} GiB before loading)"
    )


if __name__ == "__main__":
    main()
