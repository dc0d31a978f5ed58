"""`gemma-deploy bench`: speed, first token, memory, and the share of the memory bandwidth; or those of a server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.names import MIB
from gemma_deploy.options import PATH, given_of, server_options

if TYPE_CHECKING:
    from rich.table import Table

    from gemma_deploy.client import Target

BUSY = 0.5  # load average from which on others use what is measured
EPILOG = """\b
Examples:
  gemma-deploy bench workspace/NAME
  gemma-deploy bench workspace/NAME --threads 8 --contexts 128,1024,4096 --json bench.json --plot bench.png
  gemma-deploy bench workspace/NAME --prompt-tokens 64 --decode-tokens 16 --repeat 3 --contexts none
  gemma-deploy bench --server http://127.0.0.1:9000 --input-lens 510,1020 --output-lens 512 --concurrencies 1,4,8,16

Nothing else should run meanwhile. Load time, first token and peak memory are those of fresh processes, prefill and
decode of warm ones, all of them medians. Static graphs take prompts of their own length only.

A server is any that speaks OpenAI's protocol and takes prompts of token ids (vLLM's, llama.cpp's); prompts are drawn at
random, answers are as long as --output-lens says. TTFT is the time to the first token, TPOT that of each further one,
ITL the time between pieces, E2EL that to the end. Ends with 1 where a request failed.
"""
ONE_ARTIFACT = ("prompt_tokens", "decode_tokens", "repeat", "threads", "contexts")
ONE_SERVER = (
    *("model", "input_lens", "output_lens", "concurrencies", "requests", "vocab_size", "goodput", "api_key_file"),
)
A_WORKER = 4  # requests for each that runs at a time, where --requests says nothing
COLUMNS = {
    "output tokens/s": ("output_tok_s", ""),
    "requests/s": ("requests_s", ""),
    "TTFT ms": ("ttft_ms", "median"),
    "99 %": ("ttft_ms", "p99"),
    "TPOT ms": ("tpot_ms", "median"),
    "ITL 99 %": ("itl_ms", "p99"),
    "E2EL ms": ("e2el_ms", "median"),
}


def lengths(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Numbers with commas between them, or `none`."""
    if value == "none":
        return ()
    words = value.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{value!r}: expected numbers above 0 like 128,512, or none", ctx, param)
    return tuple(int(word) for word in words)


def good(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """`ttft:500` and the like: what an answer keeps to that is a good one, in milliseconds."""
    from gemma_deploy.bench.requests import MEASURES

    found = {}
    for value in values:
        name, _, number = value.partition(":")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = 0.0
        if name not in MEASURES or not 0 < found[name] < float("inf"):
            raise click.BadParameter(f"{value!r}: expected ttft:MS, tpot:MS or e2el:MS", ctx, param)
    return found


@click.command("bench", epilog=EPILOG)
@click.argument("artifact", type=PATH, required=False)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="0 takes all cores.")
@click.option("--contexts", callback=lengths, metavar="N,N", default="128,512,2048,8192", show_default=True)
@click.option("--json", "json_file", type=PATH, help="Write the figures there.")
@click.option(
    "--plot", "plot_file", type=PATH, help="Draw speed over context length there, or over requests at a time."
)
@server_options("Measure a server instead of ARTIFACT.")
@click.option("--input-lens", callback=lengths, metavar="N,N", default="512", show_default=True)
@click.option("--output-lens", callback=lengths, metavar="N,N", default="128", show_default=True)
@click.option("--concurrencies", callback=lengths, metavar="N,N", default="1,4,8,16", show_default=True)
@click.option("--requests", type=click.IntRange(min=0), default=0, help="Of each; 0 takes four for each at a time.")
@click.option("--vocab-size", type=click.IntRange(min=2), default=256_000, show_default=True, help="Ids are below it.")
@click.option("--goodput", callback=good, multiple=True, metavar="NAME:MS", help="Such as ttft:500.")
@click.pass_context
def command(
    ctx: click.Context,
    artifact: Path | None,
    server: str | None,
    json_file: Path | None,
    plot_file: Path | None,
    **options: Any,
) -> None:
    """Measure ARTIFACT on this machine, or a server."""
    from gemma_deploy import extras
    from gemma_deploy.bench import picture

    _check_one(ctx, artifact, server)
    if plot_file is not None:
        extras.require("plots", what="--plot")
    _check_places(json_file, plot_file, picture.KINDS)
    if artifact is not None:
        chosen = {name: options[name] for name in ONE_ARTIFACT}
        return _measure_artifact(artifact, json_file=json_file, plot_file=plot_file, **chosen)
    from gemma_deploy.client import Target, key_in

    assert server is not None
    target = Target(server, options["model"] or "", key_in(options["api_key_file"]), vocabulary=options["vocab_size"])
    failed = _measure_server(
        target,
        **{name: options[name] for name in ("input_lens", "output_lens", "concurrencies", "requests")},
        limits=options["goodput"],
        json_file=json_file,
        plot_file=plot_file,
    )
    ctx.exit(1 if failed else 0)


def _check_one(ctx: click.Context, artifact: Path | None, server: str | None) -> None:
    """Refuse neither and both, and options of the other."""
    if (artifact is None) == (server is None):
        raise click.UsageError("name one thing to measure: ARTIFACT, or --server URL")
    others = ONE_SERVER if server is None else ONE_ARTIFACT
    given = given_of(ctx, others)
    if given:
        raise click.UsageError(f"{', '.join(given)}: of {'a server' if server is None else 'an artifact'} only")
    empty = [
        f"--{name.replace('_', '-')}" for name in ("input_lens", "output_lens", "concurrencies") if not ctx.params[name]
    ]
    if empty:
        raise click.UsageError(f"{', '.join(empty)}: at least one number")


def _measure_artifact(
    artifact: Path,
    *,
    prompt_tokens: int,
    decode_tokens: int,
    repeat: int,
    threads: int,
    contexts: tuple[int, ...],
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    from gemma_deploy.bench import figures, picture
    from gemma_deploy.engine import open_engine
    from gemma_deploy.tables import console
    from gemma_deploy.writing import finite, write_json

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


def _measure_server(
    target: Target,
    *,
    input_lens: tuple[int, ...],
    output_lens: tuple[int, ...],
    concurrencies: tuple[int, ...],
    requests: int,
    limits: Mapping[str, float],
    json_file: Path | None,
    plot_file: Path | None,
) -> int:
    """Measure a server, show it, and write what was asked for.

    Args:
        input_lens, output_lens, concurrencies: each with each; requests: of each, 0 for four for each at a time.

    Returns:
        Requests that failed.
    """
    from gemma_deploy import extras
    from gemma_deploy.bench import picture
    from gemma_deploy.bench.requests import Load
    from gemma_deploy.bench.server import measure_server
    from gemma_deploy.tables import console
    from gemma_deploy.writing import finite, write_json

    extras.require("client", what="`gemma-deploy bench --server`")
    loads = [
        Load(tokens, made, count, requests or A_WORKER * count)
        for tokens in input_lens
        for made in output_lens
        for count in concurrencies
    ]
    measured = measure_server(target, loads, limits=limits, say=lambda line: click.echo(f"measuring  {line}", err=True))
    if json_file is not None:
        write_json(json_file, finite(measured), sort_keys=False)
    if plot_file is not None:
        picture.draw_server(measured, plot_file)
    console().print(_loads(measured))
    failed = 0
    for load in measured["loads"]:
        failed += load["failed"]
        for problem in load["problems"]:
            click.echo(f"of {load['concurrency']} at a time {load['failed']} failed: {problem}", err=True)
    return failed


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


def _loads(measured: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table("in", "out", "at a time", *COLUMNS, title=f"{measured['model']} at {measured['server']}")
    limits = measured["limits_ms"]
    if limits:
        table.add_column("good/s")
    for load in measured["loads"]:
        row = [str(load[key]) for key in ("input_tokens", "output_tokens", "concurrency")]
        for key, part in COLUMNS.values():
            value = load[key] if not part else load[key] and load[key][part]
            row.append("-" if value is None else f"{value:.1f}")
        if limits:
            row.append(f"{load['goodput_requests_s']:.2f}")
        table.add_row(*row)
    return table
