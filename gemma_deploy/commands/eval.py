"""`gemma-deploy eval`: how good an artifact, a checkpoint or what a server computes is, on text or on C-Eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.options import NAME, PATH, adapter_option, given_of, server_options

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import AdapterRef
    from gemma_deploy.client import Target
    from gemma_deploy.evaluation.tasks import ExamRequest, TextRequest

OF_TASK = {"ppl": ("text", "windows", "seqlen"), "ceval": ("path", "split", "shots", "subjects", "limit")}
EPILOG = """\b
Examples:
  gemma-deploy eval workspace/NAME --task ppl --text wikitext2_valid.txt --windows 32
  gemma-deploy eval workspace/NAME --task ppl --against workspace/OTHER
  gemma-deploy eval workspace/NAME --task ppl --kernels strict
  gemma-deploy eval workspace/NAME --task ppl --adapter runs/pirate/adapter
  gemma-deploy eval /models/gemma-3-270m --task ppl --text book.txt --seqlen 1024
  gemma-deploy eval workspace/NAME --task ceval --path ceval-exam.zip --shots 5
  gemma-deploy eval workspace/NAME --task ceval --path ceval-exam.zip --shots 0 --against hf --limit 20
  gemma-deploy eval --server http://127.0.0.1:9000 --task ppl --text wikitext2_valid.txt

A server is asked for the log-probabilities of prompts (`echo` with `logprobs` of OpenAI's completions) and for tokens
(`/tokenize`, or --tokenizer).
"""
OF_TARGET = ("against", "checkpoint", "adapter", "kernels", "record")
OF_SERVER = ("model", "tokenizer", "api_key_file")


@click.command("eval", epilog=EPILOG)
@click.argument("target", type=NAME, required=False)
@click.option("--task", type=click.Choice(list(OF_TASK)), required=True)
@click.option(
    "--against",
    type=NAME,
    metavar="hf|none|PATH",
    help="hf: the artifact's checkpoint in transformers, float32; or an artifact or checkpoint  "
    "[default: hf for the perplexity of an artifact, else none]",
)
@click.option("--checkpoint", type=NAME, metavar="PATH", help="An artifact's checkpoint  [default: as in its recipe]")
@adapter_option(
    "Added to a checkpoint; computed beside the weights of an artifact that takes adapters; where one was merged into "
    "it, where that is now."
)
@click.option("--text", type=PATH, help="ppl: UTF-8 file  [default: the bundled C4 sample]")
@click.option("--windows", type=click.IntRange(min=1), help="ppl: windows at most  [default: 16]")
@click.option(
    "--seqlen",
    type=click.IntRange(min=2),
    help="ppl: tokens of a window, BOS too  [default: 512, or the prefill length]",
)
@click.option("--path", type=PATH, help="ceval: ceval-exam.zip  [default: the bundled sample]")
@click.option("--split", type=click.Choice(["val", "test"]), help="ceval: which questions  [default: val]")
@click.option("--shots", type=click.IntRange(0, 5), help="ceval: solved examples before each  [default: 5]")
@click.option("--subjects", metavar="NAME,NAME", help="ceval: only these  [default: all]")
@click.option("--limit", type=click.IntRange(min=1), help="ceval: only the first questions of each subject.")
@click.option(
    "--kernels",
    type=click.Choice(["shipped", "strict"]),
    help="Of an ONNX Runtime artifact: those it ships, or float32 products on its weights  [default: shipped]",
)
@click.option("--json", "json_file", type=PATH, help="Write the result there.")
@click.option("--record/--no-record", default=True, help="Keep it in the artifact and its report.  [default: record]")
@server_options("Evaluate what a server computes instead of TARGET.")
@click.option("--tokenizer", type=PATH, help="Directory of the server's tokenizer.json  [default: its /tokenize]")
@click.pass_context
def command(
    ctx: click.Context,
    target: str | None,
    task: str,
    against: str | None,
    checkpoint: str | None,
    adapter: tuple[AdapterRef, ...],
    text: Path | None,
    windows: int | None,
    seqlen: int | None,
    path: Path | None,
    split: str | None,
    shots: int | None,
    subjects: str | None,
    limit: int | None,
    kernels: str | None,
    json_file: Path | None,
    record: bool,
    server: str | None,
    model: str | None,
    tokenizer: Path | None,
    api_key_file: Path | None,
) -> None:
    """Evaluate TARGET, an artifact, a checkpoint's directory, a .gguf file or `demo`, alone or beside another.

    Static artifacts run strict, as their graphs say to the letter, those for ONNX Runtime with the kernels they ship.
    Judges nothing; `parity` does.
    """
    from gemma_deploy.evaluation import record as records
    from gemma_deploy.evaluation import tasks
    from gemma_deploy.evaluation.models import is_artifact
    from gemma_deploy.progress import shown
    from gemma_deploy.reading import refuse_output

    _refuse_options(ctx, task)
    _check_one(ctx, target, server)
    if json_file is not None:
        refuse_output(json_file, "--json")
    names = tuple(name.strip() for name in subjects.split(",") if name.strip()) if subjects else ()
    of_text = tasks.TextRequest(text, windows, seqlen)
    of_exam = tasks.ExamRequest(path, split or "val", 5 if shots is None else shots, names, limit)
    if target is None:
        from gemma_deploy.client import Target, key_in

        assert server is not None
        asked = Target(server, model or "", key_in(api_key_file))
        result = _from_server(asked, of_text if task == "ppl" else of_exam, tokenizer)
        return _finish(result, server, json_file)
    record = record and is_artifact(Path(target))
    if record:
        records.refuse_read_only(Path(target))
        records.finish_interrupted(Path(target))
    pair = tasks.open_pair(target, against, checkpoint, task=task, kernels=kernels, adapters=adapter)
    if task == "ppl":
        with shown("eval", "windows") as tick:
            result = tasks.run_text(pair, of_text, tick)
    else:
        with shown("eval", "questions") as tick:
            result = tasks.run_exam(pair, of_exam, tick)
    titles = [pair.target.title] + ([] if pair.reference is None else [pair.reference.title])
    _finish(result, target, json_file, titles=titles, record=record)


def _finish(
    result: dict[str, Any],
    target: str,
    json_file: Path | None,
    *,
    titles: Sequence[str] = (),
    record: bool = False,
) -> None:
    """Show a result, write it, and keep it in the artifact.

    Args:
        titles: of the model, and of what it is compared with; the model's name in the result where there are none.

    Raises:
        DeployError: some positions have no number.
    """
    from gemma_deploy.errors import DeployError
    from gemma_deploy.evaluation import record as records
    from gemma_deploy.writing import finite, write_json

    show = _show_text if result["task"] == "ppl" else _show_exam
    show(titles or [f"{result['target']['path']} at {target}"], result)
    for note in result["notes"]:
        click.echo(f"note: {note}")
    if json_file is not None:
        write_json(json_file, finite(result), sort_keys=False, ensure_ascii=False)
    if record:
        kept = records.record(Path(target), {key: value for key, value in result.items() if key != "answers"})
        click.echo(f"recorded  {kept}")
    if result.get("bad_positions"):
        raise DeployError(
            f"{result['bad_positions']} of {result['bad_positions'] + result['scored_tokens']} positions have logits "
            "that are inf or NaN: the figures above are of the others",
            where=target,
            next_step="`gemma-deploy parity ARTIFACT` finds the first layer that is wrong",
        )


def _from_server(target: Target, request: TextRequest | ExamRequest, tokenizer: Path | None) -> dict[str, Any]:
    """The result of what a server computes."""
    from gemma_deploy import extras
    from gemma_deploy.evaluation import served
    from gemma_deploy.evaluation.tasks import TextRequest
    from gemma_deploy.progress import shown

    extras.require("client", what="`gemma-deploy eval --server`")
    with served.open_server(target) as model:
        if isinstance(request, TextRequest):
            with shown("eval", "windows") as tick:
                return served.run_text(model, request, tokenizer=tokenizer, progress=tick)
        with shown("eval", "questions") as tick:
            return served.run_exam(model, request, tokenizer=tokenizer, progress=tick)


def _check_one(ctx: click.Context, target: str | None, server: str | None) -> None:
    """Refuse neither and both, and options of the other."""
    if (target is None) == (server is None):
        raise click.UsageError("name one thing to evaluate: TARGET, or --server URL")
    if given := given_of(ctx, OF_SERVER if server is None else OF_TARGET):
        raise click.UsageError(f"{', '.join(given)}: not {'without --server' if server is None else 'with --server'}")


def _refuse_options(ctx: click.Context, task: str) -> None:
    """An option of the other task would be ignored."""
    (other,) = OF_TASK.keys() - {task}
    if given := given_of(ctx, OF_TASK[other]):
        raise click.UsageError(f"--task {task} does not take {', '.join(given)}; --task {other} does")


def _show_text(titles: Sequence[str], result: dict[str, Any]) -> None:
    settings, compared = result["settings"], len(titles) > 1
    click.echo(f"text      {settings['text']}")
    click.echo(f"windows   {settings['windowing']}")
    rows = []
    if compared:
        error = _plus(result["perplexity_reference"], result["perplexity_reference_error"], "{:.3f}")
        rows.append([titles[1], error, "", "", ""])
    measured = [_plus(result["perplexity"], result["perplexity_error"], "{:.3f}")]
    if compared:
        measured.append(_plus(result["perplexity_change"], result["perplexity_change_error"], "{:+.2%}", "{:.2%}"))
        measured += [_plain(result["kl_mean"], "{:.3g}"), _plain(result["top1"], "{:.2%}")]
    rows.append([titles[0], *measured, *[""] * (4 - len(measured))])
    headings = ["model", "perplexity", "change", "mean KL, nats", "top-1"]
    _table(headings if compared else headings[:2], rows if compared else [row[:2] for row in rows])


def _show_exam(titles: Sequence[str], result: dict[str, Any]) -> None:
    settings, reference = result["settings"], result.get("reference")
    how = f"{settings['shots']}-shot, the largest logit of A, B, C, D"
    click.echo(f"C-Eval    {settings['split']} of {settings['archive']}, {how}")
    click.echo(f"target    {titles[0]}")
    if reference is not None:
        click.echo(f"against   {titles[1]}")
    of_two = [result, reference] if reference else [result]
    rows = []
    for name in result["subjects"]:
        found = [one["subjects"][name] for one in of_two]
        rows.append([name, str(found[0]["questions"]), *(_share(one, "accuracy") for one in found)])
    rows.append(
        ["mean of the subjects", str(result["questions"]), *(_share(one, "average_over_subjects") for one in of_two)]
    )
    rows.append(["all questions", str(result["questions"]), *(_share(one, "accuracy") for one in of_two)])
    _table(["subject", "questions", "accuracy", "against"][: 2 + len(of_two)], rows)
    if reference is not None:
        change = _plus(result["accuracy_change"], result["accuracy_change_error"], "{:+.2%}", "{:.2%}")
        click.echo(f"the same choice in {result['same_choice']:.1%}; accuracy {change}")


def _table(headings: list[str], rows: list[list[str]]) -> None:
    from gemma_deploy.tables import console, table_of

    console().print(table_of(headings, rows))


def _share(one: dict[str, Any], key: str) -> str:
    return _plus(one[key], one[f"{key}_error"], "{:.1%}")


def _plus(value: float | None, error: float | None, shape: str, error_shape: str | None = None) -> str:
    """A figure and its standard error."""
    return f"{_plain(value, shape)} ± {_plain(error, error_shape or shape)}"


def _plain(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)
