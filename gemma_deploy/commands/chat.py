"""`gemma-deploy chat`: turns with an artifact."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.generation import (
    INTERRUPTED,
    generation_options,
    keep_bytes_of_stdin,
    read_stdin,
    summary,
)

if TYPE_CHECKING:
    from gemma_deploy.runtime.chat import Conversation
    from gemma_deploy.runtime.engine import Session

log = logging.getLogger(__name__)
ASK = "> "
RESET, EXIT = "/reset", "/exit"
EPILOG = """\b
Examples:
  gemma-deploy chat workspace/NAME
  gemma-deploy chat workspace/NAME --temperature 0.8 --top-p 0.95 --seed 1 --stats
  gemma-deploy chat workspace/NAME --system "Answer in one sentence."
  printf "Hello\\nWho are you?\\n" | gemma-deploy chat workspace/NAME

A line is a message; /reset forgets the conversation, /exit or Ctrl-D leaves. Ctrl-C stops a reply, and leaves while you
type. Replies go to standard output, everything else to standard error.
"""


@click.command("chat", epilog=EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="What the model is told beforehand, where its template has that.")
@generation_options
@click.option("--stats", is_flag=True, help="Say how many tokens and how fast, after every reply.")
def command(
    artifact: Path,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    threads: int,
    stats: bool,
) -> None:
    """Talk with ARTIFACT through its chat template; the conversation is kept from turn to turn."""
    from gemma_deploy.engine import open_engine
    from gemma_deploy.errors import UsageError
    from gemma_deploy.runtime import Sampling
    from gemma_deploy.runtime.chat import Conversation
    from gemma_deploy.text import unended

    sampling = Sampling(temperature, top_k, top_p, seed)
    engine = open_engine(artifact, threads=threads)
    conversation = Conversation(engine.tokenizer, system)
    if note := unended(engine.tokenizer, engine.stop_ids):
        log.warning("%s", note)
    session = engine.session(sampling)
    keep_bytes_of_stdin()
    while (text := _read()) is not None:
        if text == RESET:
            session.reset()
            conversation.reset()
            click.echo("forgotten", err=True)
        elif text:
            try:
                _turn(session, conversation, text, max_new_tokens, stats)
            except UsageError as error:
                if not sys.stdin.isatty():
                    raise  # nobody is there to read it and go on
                click.echo(f"error: {error}\n  or: {RESET} forgets the conversation", err=True)


def _read() -> str | None:
    """The next message; None when there are no more.

    Raises:
        Exit: Ctrl-C.
    """
    try:
        text = input(ASK) if sys.stdin.isatty() else read_stdin(line=True)
    except EOFError:
        return None
    except KeyboardInterrupt:
        click.echo(err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    if not text and not sys.stdin.isatty():
        return None
    return None if text.strip() == EXIT else text.strip()


def _turn(session: Session, conversation: Conversation, text: str, max_new_tokens: int, stats: bool) -> None:
    """One message and its reply; what was said before Ctrl-C is kept."""
    from gemma_deploy.runtime.generate import GenerationStats

    done, said = GenerationStats(), ""
    pieces = session.reply(conversation.ask(text), max_new_tokens=max_new_tokens, stats=done)
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
            said += piece
    except KeyboardInterrupt:
        pass
    click.echo()
    conversation.answered(text, said)
    if stats:
        click.echo(summary(done), err=True)
