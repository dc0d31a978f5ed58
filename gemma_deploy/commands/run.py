"""`gemma-deploy run`: text from an artifact, streamed."""

from __future__ import annotations

from pathlib import Path

import click

EPILOG = """\b
Examples:
  gemma-deploy run workspace/gemma-demo-int8-128-256 -p "Return the"
  gemma-deploy run workspace/NAME -p "Once upon a time" -n 100 --temperature 0.8 --top-p 0.95 --seed 1
"""


@click.command("run", epilog=EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="The text to continue.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message through the chat template.")
@click.option("--strict", is_flag=True, help="Compute exactly what the graph says (slower for int8).")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="0 takes all cores.")
def command(
    artifact: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    chat: bool,
    strict: bool,
    threads: int,
) -> None:
    """Continue a text with ARTIFACT and print it as it comes."""
    from gemma_deploy.artifact import Artifact
    from gemma_deploy.runtime import Sampler, StaticRunner
    from gemma_deploy.runtime.generate import stream
    from gemma_deploy.runtime.tokenizer import TextTokenizer

    model = Artifact.open(artifact).manifest["model"]
    sampler = Sampler(temperature, top_k, top_p, seed)
    tokenizer = TextTokenizer(artifact, model["bos_token_id"])
    text = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else prompt
    runner = StaticRunner(artifact, "strict" if strict else "fast", threads=threads)
    if not chat:
        click.echo(prompt, nl=False)
    for piece in stream(
        runner, tokenizer, text, sampler, max_new_tokens=max_new_tokens, stop=model["eos_token_ids"]
    ):
        click.echo(piece, nl=False)
    click.echo()
