"""`gemma-deploy run`: text from an artifact, streamed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.generation import (
    INTERRUPTED,
    generation_options,
    keep_bytes_of_stdin,
    read_stdin,
    runs_in_genai,
    summary,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.runtime import Sampling
    from gemma_deploy.runtime.generate import GenerationStats, Prompt

log = logging.getLogger(__name__)
EPILOG = """\b
Examples:
  gemma-deploy run workspace/gemma-demo-int8-128-256 -p "Return the"
  gemma-deploy run workspace/NAME -p "Once upon a time" -n 100 --temperature 0.8 --top-p 0.95 --seed 1
  gemma-deploy run workspace/NAME --chat -p "Why is the sky blue?" --stats
  gemma-deploy run workspace/NAME --chat -p - --lookup --stats < text_to_correct.txt
  echo "The list of" | gemma-deploy run workspace/NAME -p - --strict

Artifacts of `backend.type: onnxruntime` run in onnxruntime-genai. The text goes to standard output, everything else to
standard error.
"""


@click.command("run", epilog=EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="The text to continue; - reads standard input.")
@click.option("--chat", is_flag=True, help="Send the text as a user's message through the chat template.")
@generation_options
@click.option("--strict", is_flag=True, help="Compute exactly what the graph says (slow; static artifacts).")
@click.option("--lookup", is_flag=True, help="Guess ahead where text repeats itself (greedy; ONNX Runtime artifacts).")
@click.option("--stats", is_flag=True, help="Say how many tokens and how fast, at the end.")
def command(
    artifact: Path,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    threads: int,
    strict: bool,
    lookup: bool,
    stats: bool,
) -> None:
    """Continue a text with ARTIFACT and print it as it comes.

    Weights are not hashed at every start: `gemma-deploy verify` does that.
    """
    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.runtime import Sampling
    from gemma_deploy.runtime.generate import GenerationStats

    sampling = Sampling(temperature, top_k, top_p, seed)
    opened = open_whole(artifact, hashes=True)
    if prompt == "-":
        keep_bytes_of_stdin()
        prompt = read_stdin().rstrip("\n")
    done = GenerationStats()
    text: Prompt = [{"role": "user", "content": prompt}] if chat else prompt
    if lookup:
        _refuse_lookup(opened, sampling, strict)
    pieces = _pieces(opened, text, max_new_tokens, sampling, threads, strict, lookup, done)
    waiting, interrupted = "" if chat else prompt, False  # a prompt is shown when its continuation begins
    try:
        for piece in pieces:
            click.echo(waiting + piece, nl=False)
            waiting = ""
    except KeyboardInterrupt:
        interrupted = True
    click.echo(waiting)
    if stats:
        click.echo(summary(done), err=True)
    if interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def _pieces(
    artifact: Artifact,
    text: Prompt,
    max_new_tokens: int,
    sampling: Sampling,
    threads: int,
    strict: bool,
    lookup: bool,
    done: GenerationStats,
) -> Iterator[str]:
    from gemma_deploy.backends.onnxruntime import genai
    from gemma_deploy.backends.onnxruntime import lookup as ahead
    from gemma_deploy.backends.onnxruntime.genai import GenaiModel
    from gemma_deploy.backends.tvm_vacc import generate
    from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
    from gemma_deploy.errors import UsageError
    from gemma_deploy.runtime import Tokenizer
    from gemma_deploy.runtime.generate import stop_token_ids
    from gemma_deploy.text import unended

    tokenizer = Tokenizer(artifact.path)
    if not isinstance(text, str) and (note := unended(tokenizer, stop_token_ids(artifact.manifest))):
        log.warning("%s", note)
    if lookup:
        searched = ahead.LookupModel(artifact.path, artifact.manifest, threads)
        return ahead.stream(searched, tokenizer, text, max_new_tokens=max_new_tokens, stats=done)
    if runs_in_genai(artifact.manifest):
        if strict:
            raise UsageError(
                "--strict is for static artifacts: this one is computed by the operators that its graph names",
                where=str(artifact.path),
                next_step="leave --strict out",
            )
        model = GenaiModel(artifact.path, threads)
        return genai.stream(model, tokenizer, text, max_new_tokens=max_new_tokens, sampling=sampling, stats=done)
    runner = StaticRunner(
        artifact.path, "strict" if strict else "fast", threads, manifest=artifact.manifest, one_prompt=True
    )
    return generate.stream(
        runner, tokenizer, text, max_new_tokens=max_new_tokens, sampler=sampling.sampler(), stats=done
    )


def _refuse_lookup(artifact: Artifact, sampling: Sampling, strict: bool) -> None:
    from gemma_deploy.errors import UsageError

    problems = []
    if not runs_in_genai(artifact.manifest):
        problems.append("this artifact is static: its decode graph takes one token")
    if sampling.temperature > 0:
        problems.append(f"--temperature {sampling.temperature:g}: what is drawn at random cannot be looked up")
    if strict:
        problems.append("--strict is for static artifacts")
    if problems:
        raise UsageError(
            "--lookup is not possible here",
            where=str(artifact.path),
            problems=problems,
            expected="greedy decoding of an artifact of backend.type onnxruntime",
            next_step="leave --lookup out",
        )
