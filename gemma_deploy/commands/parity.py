"""`gemma-deploy parity`: an artifact, or the patched model alone, against its reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.backends import ROWS
from gemma_deploy.options import NAME, PATH, adapter_option

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import AdapterRef
    from gemma_deploy.parity.compare import ParityResult
    from gemma_deploy.proving.requests import Request

EPILOG = """\b
Examples:
  gemma-deploy parity --backend onnxruntime
  gemma-deploy parity workspace/NAME --text book.txt --prompt-tokens 700 --html parity.html
  gemma-deploy parity workspace/NAME --against workspace/OTHER
  gemma-deploy parity workspace/NAME --adapter runs/pirate/adapter
  gemma-deploy parity --stage patched --checkpoint /models/gemma-3-270m
"""


@click.command("parity", epilog=EPILOG)
@click.argument("artifact", required=False, type=PATH)
@click.option(
    "--backend",
    type=click.Choice(ROWS),
    help="What computes the graphs here, not the recipe's backend.type  [default: what there is for the artifact]",
)
@click.option("--against", type=NAME, default="hf", show_default=True, metavar="hf|ARTIFACT", help="The reference.")
@click.option(
    "--stage",
    type=click.Choice(["artifact", "patched"]),
    default="artifact",
    show_default=True,
    help="patched: compare the patched modeling files alone with transformers; needs no artifact.",
)
@click.option("--checkpoint", type=NAME, metavar="PATH", help="Where the checkpoint is  [default: as in the recipe]")
@adapter_option(
    "Computed beside the weights of an artifact that takes adapters, and compared with PEFT; where one was merged into "
    "it, where that is now; with --stage patched, added to the checkpoint."
)
@click.option("--text", type=PATH, help="UTF-8 file to take the prompt from.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="[default: the artifact's recipe, or 64]")
@click.option("--decode-tokens", type=click.IntRange(min=0), help="[default: the artifact's recipe, or 32]")
@click.option("--fast/--no-fast", default=True, help="Measure the optimized session as well.  [default: fast]")
@click.option("--workspace", type=PATH, default=Path("workspace"), show_default=True)
@click.option("--json", "json_file", type=PATH, help="Write every measure there.")
@click.option("--html", "html_file", type=PATH, help="Write a page there.")
def command(
    artifact: Path | None,
    backend: str | None,
    against: str,
    stage: str,
    checkpoint: str | None,
    adapter: tuple[AdapterRef, ...],
    text: Path | None,
    prompt_tokens: int | None,
    decode_tokens: int | None,
    fast: bool,
    workspace: Path,
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Compare ARTIFACT (by default the newest in the workspace) with its reference.

    Exit 1 when a gate fails, or when they all pass on files that are not the ones that were written.
    """
    from gemma_deploy import extras

    extras.require("build", what="`gemma-deploy parity`")
    from gemma_deploy.errors import GateError
    from gemma_deploy.progress import reported
    from gemma_deploy.proving import requests
    from gemma_deploy.reading import refuse_output
    from gemma_deploy.writing import finite, write_json, write_text

    for option, file in (("--json", json_file), ("--html", html_file)):
        if file is not None:
            refuse_output(file, option)
    with reported("parity") as report:
        request = requests.Request(text, prompt_tokens, decode_tokens, fast, report, adapter)
        title, result, advice = _compare(artifact, against, stage, checkpoint, workspace, request, backend)
    _show(title, result)
    if json_file is not None:
        write_json(json_file, finite({"title": title, **result.to_json()}), sort_keys=False)
    if html_file is not None:
        write_text(html_file, requests.page(title, result))
    if not result.passed:
        raise GateError("a gate failed", where=title, problems=result.failures(), next_step=advice)


def _compare(
    artifact: Path | None,
    against: str,
    stage: str,
    checkpoint: str | None,
    workspace: Path,
    request: Request,
    backend: str | None,
) -> tuple[str, ParityResult, str]:
    """What was compared, with which result, and what to do where that is not right."""
    from gemma_deploy.artifact.check import byte_problems, open_whole, refuse
    from gemma_deploy.errors import UsageError
    from gemma_deploy.proving import requests

    advice, artifacts = "see the table above", []
    if stage == "patched":
        if artifact is not None or against != "hf":
            raise UsageError(
                "--stage patched compares a checkpoint's patched model with transformers",
                next_step="name the checkpoint with --checkpoint, and no artifact",
            )
        if backend is not None:
            raise UsageError(
                "--stage patched runs no graph: both sides are computed by PyTorch", next_step="leave --backend out"
            )
        title, result = f"patched, {checkpoint or 'demo'}", requests.patched_stage(checkpoint or "demo", request)
    else:
        path = requests.find_artifact(artifact, workspace)
        artifacts = [open_whole(path)]
        advice = f"`gemma-deploy verify {path}` tells a damaged file from a wrong computation; see the table above"
        if against != "hf":
            artifacts.append(open_whole(against))
        if backend is not None:
            for opened in artifacts:
                requests.refuse_runtime(backend, opened.manifest)
        if against == "hf":
            title, result = str(path), requests.artifact_stage(path, checkpoint, request)
        else:
            title = f"{path} against {against}"
            result = requests.two_artifacts(path, Path(against), checkpoint, request=request)
    # A damaged weight that no prompt here brings out passes every gate; where one fails, it says where.
    if result.passed:
        for opened in artifacts:
            refuse(opened, byte_problems(opened))
    return title, result, advice


def _show(title: str, result: ParityResult) -> None:
    from gemma_deploy.artifact.gate_rows import HEADINGS, WORDS, gate_rows, headline
    from gemma_deploy.tables import console, table_of

    columns = {"relative": "rel. error", "kl_mean": "mean KL", "top1": "top-1", "greedy_prefix": "greedy",
               "ppl_delta": "perplexity"}  # fmt: skip
    if any("cosine_distance" in row for row in result.measures):  # an encoder's
        columns = {"relative": "rel. error", "cosine_distance": "cosine distance"}
    rows = []
    for row in result.measures:
        names = f"{row['reference']} = {row['test']}", f"{row['case']} {row['phase']}", str(row["positions"])
        rows.append([*names, *(_number(row[key], key) for key in columns)])
    shown = console()
    shown.print(table_of(("compared", "tokens", "n", *columns.values()), rows, title=title, words=("tokens",)))
    for note in result.notes:
        click.echo(f"note: {note}")
    shown.print(table_of(HEADINGS, gate_rows(result.lines), title="gate", words=WORDS))
    if result.divergence:
        click.echo(f"where   {result.divergence['text']}")
    click.echo(f"parity  {headline(result)}")


def _number(value: Any, key: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:+.2%}" if key == "ppl_delta" else f"{value:.3g}"
