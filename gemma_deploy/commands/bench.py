"""`gemma-deploy bench`: speed, first token, memory, and the share of the memory bandwidth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.names import MIB
from gemma_deploy.options import PATH

if TYPE_CHECKING:
    from rich.table import Table

BUSY = 0.5  # load average from which on others use what is measured
EPILOG = """\b
Examples:
  gemma-deploy bench workspace/NAME
  gemma-deploy bench workspace/NAME --threads 8 --contexts 128,1024,4096 --json bench.json --plot bench.png
  gemma-deploy bench workspace/NAME --prompt-tokens 64 --decode-tokens 16 --repeat 3 --contexts none

Nothing else should run meanwhile. Load time, first token and peak memory are those of fresh processes, prefill and
decode of warm ones, all of them medians. Static graphs take prompts of their own length only.
"""


def lengths(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Numbers with commas between them, or `none`."""
    if value == "none":
        return ()
    words = value.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{value!r}: expected numbers above 0 like 128,512, or none", ctx, param)
    return tuple(int(word) for word in words)


@click.command("bench", epilog=EPILOG)
@click.argument("artifact", type=PATH)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="0 takes all cores.")
@click.option("--contexts", callback=lengths, metavar="N,N", default="128,512,2048,8192", show_default=True)
@click.option("--json", "json_file", type=PATH, help="Write the figures there.")
@click.option("--plot", "plot_file", type=PATH, help="Draw speed over context length there.")
def command(
    artifact: Path,
    prompt_tokens: int,
    decode_tokens: int,
    repeat: int,
    threads: int,
    contexts: tuple[int, ...],
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure ARTIFACT on this machine."""
    from gemma_deploy import extras
    from gemma_deploy.bench import figures, picture
    from gemma_deploy.engine import open_engine
    from gemma_deploy.tables import console
    from gemma_deploy.writing import finite, write_json

    if plot_file is not None:
        extras.require("plots", what="--plot")
    _check_places(json_file, plot_file, picture.KINDS)
    engine = open_engine(artifact, threads=threads)
    if plot_file is not None and not figures.lengths_that_fit(engine, contexts):
        raise click.UsageError("--plot has nothing to draw: this artifact takes none of the lengths in --contexts")
    measured = figures.measure(
        engine,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        repeat=repeat,
        threads=threads,
        contexts=contexts,
        say=lambda line: click.echo(f"measuring  {line}", err=True),
    )
    if json_file is not None:
        write_json(json_file, finite(measured), sort_keys=False)
    if plot_file is not None:
        picture.draw(measured, plot_file)
    shown = console()
    shown.print(_table(measured))
    if measured["contexts"]:
        shown.print(_contexts(measured))
    if (load := measured["machine"]["load_average_before"]) > BUSY:
        click.echo(f"the load average was {load:.1f} at the start: other programs ran, and these figures are too low")
    if measured["left_out"]:
        lengths = ", ".join(map(str, measured["left_out"]))
        reason = f"the artifact has {measured['context_length']} positions"
        if measured["runtime"] == "static":
            reason = f"it takes prompts of {measured['prompt_limit']} tokens"
        click.echo(f"contexts left out: {lengths} ({reason})")


def _check_places(json_file: Path | None, plot_file: Path | None, kinds: tuple[str, ...]) -> None:
    """Refuse what could not be written, before anything is measured."""
    from gemma_deploy.reading import refuse_output

    for file in (json_file, plot_file):
        if file is not None:
            refuse_output(file, "--json" if file is json_file else "--plot")
    if plot_file is not None and plot_file.suffix.lower() not in kinds:
        raise click.UsageError(f"--plot {plot_file}: expected a name that ends in {', '.join(kinds)}")


def _table(measured: Mapping[str, Any]) -> Table:
    from rich.table import Table

    from gemma_deploy.machine import size

    threads = f"{measured['threads']} threads{' (all cores)' if measured['all_cores'] else ''}"
    runtime = f"{measured['runtime']} {measured['level']}".rstrip()
    table = Table(title=f"{measured['artifact']}, {runtime}, {threads}", show_header=False)
    share, decode = measured["share_of_bandwidth"], measured["decode_tok_s"]
    rows = {
        f"prefill of {measured['prompt_tokens']} tokens": f"{measured['prefill_tok_s']:.1f} tokens/s",
        f"decode after {measured['decode_after_tokens']} tokens": f"{decode:.1f} tokens/s" if decode else "no room",
        "first token, cold process": f"{measured['ttft_s']:.2f} s",
        "of which loading model, tokenizer": f"{measured['load_s']:.2f} s, {measured['tokenizer_s']:.2f} s",
        "peak RSS": f"{measured['peak_rss_bytes'] / MIB:.0f} MiB",
        "artifact": size(measured["artifact_bytes"]),
        "read for a token": size(measured["bytes_per_token"]),
        "memory reads at": f"{measured['bandwidth_bytes_s'] / 1e9:.1f} GB/s",
        "of which decode uses": f"{share:.1%}" if share else "no room",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _contexts(measured: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table("context", "prefill tokens/s", "decode tokens/s")
    for point in measured["contexts"]:
        decode = f"{point['decode_tok_s']:.1f}" if point["decode_tok_s"] else "no room"
        table.add_row(str(point["tokens"]), f"{point['prefill_tok_s']:.1f}", decode)
    return table
