"""`gemma-deploy run`: text from an artifact, streamed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gemma_deploy.runtime.generate import GenerationStats

INTERRUPTED = 130
ENDED = {
    "stop": "the model ended its text",
    "length": "--max-new-tokens is reached",
    "context": "the context is full",
    None: "interrupted",
}
EPILOG = """\b
Examples:
  gemma-deploy run workspace/gemma-demo-int8-128-256 -p "Return the"
  gemma-deploy run workspace/NAME -p "Once upon a time" -n 100 --temperature 0.8 --top-p 0.95 --seed 1
  gemma-deploy run workspace/NAME --chat -p "Why is the sky blue?" --stats
  echo "The list of" | gemma-deploy run workspace/NAME -p - --strict

The text goes to standard output, everything else to standard error.
"""


@click.command("run", epilog=EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="The text to continue; - reads standard input.")
@click.option("--chat", is_flag=True, help="Send the text as a user's message through the chat template.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from the K most probable; 0 is all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the most probable that make up P.")
@click.option("--seed", type=int, help="Same seed, same text  [default: another text every time]")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="0 takes all cores.")
@click.option("--strict", is_flag=True, help="Compute exactly what the graph says (slow).")
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
    stats: bool,
) -> None:
    """Continue a text with ARTIFACT and print it as it comes.

    Weights are not hashed at every start: `gemma-deploy verify` does that.
    """
    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.runtime import Sampler, StaticRunner, Tokenizer
    from gemma_deploy.runtime.generate import GenerationStats, stream

    sampler = Sampler(temperature, top_k, top_p, seed)
    manifest = open_whole(artifact, hashes=True).manifest
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    tokenizer = Tokenizer(artifact)
    runner = StaticRunner(artifact, "strict" if strict else "fast", threads, manifest=manifest, one_prompt=True)
    done = GenerationStats()
    text = [{"role": "user", "content": prompt}] if chat else prompt
    pieces = stream(runner, tokenizer, text, max_new_tokens=max_new_tokens, sampler=sampler, stats=done)
    waiting, interrupted = "" if chat else prompt, False  # a prompt is shown when its continuation begins
    try:
        for piece in pieces:
            click.echo(waiting + piece, nl=False)
            waiting = ""
    except KeyboardInterrupt:
        interrupted = True
    click.echo(waiting)
    if stats:
        click.echo(_summary(done), err=True)
    if interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def _summary(done: GenerationStats) -> str:
    return (
        f"loading {done.load_seconds:.2f} s; {done.prompt_tokens} prompt tokens in {done.prefill_seconds:.2f} s; "
        f"{len(done.tokens)} tokens at {done.tokens_per_second:.1f} tokens/s; {ENDED[done.finish]}"
    )
