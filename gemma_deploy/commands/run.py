"""`gemma-deploy run`: text from an artifact, streamed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.generation import (
    INTERRUPTED,
    Screen,
    generation_options,
    keep_bytes_of_stdin,
    read_stdin,
    summary,
)
from gemma_deploy.options import NAME, PATH

if TYPE_CHECKING:
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.chat import ChatEvent
    from gemma_deploy.runtime import Sampling
    from gemma_deploy.runtime.engine import Engine

log = logging.getLogger(__name__)
EPILOG = """\b
Examples:
  gemma-deploy run workspace/gemma-demo-int8-128-256 -p "Return the"
  gemma-deploy run workspace/NAME -p "Once upon a time" -n 100 --temperature 0.8 --top-p 0.95 --seed 1
  gemma-deploy run workspace/NAME --chat -p "Why is the sky blue?" --stats
  gemma-deploy run workspace/NAME --chat -p - --lookup --stats < text_to_correct.txt
  gemma-deploy run workspace/LARGE -p "Once upon a time" --draft workspace/SMALL --stats
  gemma-deploy run workspace/NAME --adapter runs/pirate/adapter -p "Once upon a time"
  echo "The list of" | gemma-deploy run workspace/NAME -p - --strict

Artifacts of `backend.type: onnxruntime` run in onnxruntime-genai where that is installed, or else in ONNX Runtime
itself. The text goes to standard output, everything else to standard error.
"""


@click.command("run", epilog=EPILOG)
@click.argument("artifact", type=PATH)
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="The text to continue; - reads standard input.")
@click.option("--chat", is_flag=True, help="Send the text as a user's message through the chat template.")
@generation_options
@click.option("--strict", is_flag=True, help="Compute exactly what the graph says (slow; static artifacts).")
@click.option("--lookup", is_flag=True, help="Guess ahead where text repeats itself (greedy; no static artifacts).")
@click.option("--draft", type=PATH, help="An artifact of a smaller Gemma that guesses ahead (no static ones).")
@click.option(
    "--adapter", type=NAME, metavar="NAME|DIR", help="A LoRA adapter: kept in the artifact, or peft's directory."
)
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
    draft: Path | None,
    adapter: str | None,
    stats: bool,
) -> None:
    """Continue a text with ARTIFACT and print it as it comes.

    Weights are not hashed at every start: `gemma-deploy verify` does that.
    """
    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.engine import open_engine, refuse_encoder
    from gemma_deploy.runtime import Sampling
    from gemma_deploy.runtime.generate import GenerationStats
    from gemma_deploy.text import unended

    sampling = Sampling(temperature, top_k, top_p, seed)
    opened = open_whole(artifact, hashes=True)
    guessing = None if draft is None else open_whole(draft, hashes=True)
    refuse_encoder(opened)
    if prompt == "-":
        keep_bytes_of_stdin()
        prompt = read_stdin().rstrip("\n")
    done = GenerationStats()
    if lookup or draft is not None:
        _refuse_ahead(opened, sampling, strict=strict, lookup=lookup, draft=draft)
    engine = open_engine(opened, threads=threads, strict=strict, one_reply=True)
    if chat and (note := unended(engine.tokenizer, engine.stop_ids)):
        log.warning("%s", note)
    name = None if adapter is None else engine.load_adapter(adapter)
    smaller = None if guessing is None else open_engine(guessing, threads=threads)
    options = {"sampling": sampling, "max_new_tokens": max_new_tokens, "lookup": lookup, "draft": smaller}
    interrupted = _show(engine, prompt, chat, **options, adapter=name, stats=done)
    if stats:
        click.echo(summary(done), err=True)
    if interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def _show(engine: Engine, prompt: str, chat: bool, **options: Any) -> bool:
    """Continue or answer a text, and print that as it comes; whether somebody interrupted it."""
    from gemma_deploy.chat import Text

    screen, waiting, interrupted = Screen(), "" if chat else prompt, False
    if chat:
        events: Iterator[ChatEvent] = engine.chat([{"role": "user", "content": prompt}], **options)
    else:  # the prompt is shown when its continuation begins
        events = (Text(piece) for piece in engine.stream(prompt, **options))
    try:
        for event in events:
            screen.show([Text(waiting), event])
            waiting = ""
    except KeyboardInterrupt:
        interrupted = True
    screen.show([Text(waiting)])
    screen.close()
    return interrupted


def _refuse_ahead(artifact: Artifact, sampling: Sampling, *, strict: bool, lookup: bool, draft: Path | None) -> None:
    from gemma_deploy.backends import backend_of
    from gemma_deploy.errors import UsageError

    asked = " and ".join(name for name, given in (("--lookup", lookup), ("--draft", draft is not None)) if given)
    no_lookup = backend_of(artifact.manifest).no_lookup
    problems = [no_lookup] if no_lookup else []
    if lookup and draft is not None:
        problems.append("both guess what comes next, and one is listened to")
    if lookup and sampling.temperature > 0:
        problems.append(f"--temperature {sampling.temperature:g}: what is drawn at random cannot be looked up")
    if strict:
        problems.append("--strict is for static artifacts")
    if problems:
        raise UsageError(
            f"{asked} is not possible here" if asked.count("--") == 1 else f"{asked} are not possible here",
            where=str(artifact.path),
            problems=problems,
            expected=f"{'greedy decoding of ' if lookup else ''}an artifact of backend.type onnxruntime or native",
            next_step="leave one of them out" if lookup and draft is not None else f"leave {asked} out",
        )
