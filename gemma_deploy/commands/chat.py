"""`gemma-deploy chat`: turns with an artifact."""

from __future__ import annotations

import difflib
import logging
import re
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
from gemma_deploy.options import NAME, PATH

if TYPE_CHECKING:
    from gemma_deploy.runtime.chat import Conversation
    from gemma_deploy.runtime.engine import Engine, Session

log = logging.getLogger(__name__)
ASK = "> "
HELP, RESET, ADAPTER, EXIT = "/help", "/reset", "/adapter", "/exit"
NONE = "none"  # /adapter none
COMMANDS = {
    HELP: "this list",
    ADAPTER: f"the adapters there are; {ADAPTER} NAME goes on with another, {ADAPTER} {NONE} with the model alone",
    RESET: "forget the conversation",
    EXIT: "leave; so does Ctrl-D",
}
BESIDE = {
    "Ctrl-C": "stops a reply; twice while you type, leaves",
    "//TEXT": "sends /TEXT as a message",
}
AGAIN = "Ctrl-C once more leaves"
EPILOG = """\b
Examples:
  gemma-deploy chat workspace/NAME
  gemma-deploy chat workspace/NAME --temperature 0.8 --top-p 0.95 --seed 1 --stats
  gemma-deploy chat workspace/NAME --system "Answer in one sentence."
  gemma-deploy chat workspace/NAME --adapter pirate --adapter runs/poet/adapter
  printf "Hello\\nWho are you?\\n" | gemma-deploy chat workspace/NAME

A line is a message; /help lists the commands, /reset forgets the conversation, /exit or Ctrl-D leaves. Ctrl-C stops a
reply, and leaves when pressed twice while you type. Replies go to standard output, everything else to standard error.
"""


@click.command("chat", epilog=EPILOG)
@click.argument("artifact", type=PATH)
@click.option("--system", metavar="TEXT", help="What the model is told beforehand, where its template has that.")
@generation_options
@click.option(
    "--adapter",
    "adapters",
    type=NAME,
    multiple=True,
    metavar="NAME|DIR",
    help="A LoRA adapter: kept in the artifact, or a directory of peft's. The first one speaks; /adapter changes it.",
)
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
    adapters: tuple[str, ...],
    stats: bool,
) -> None:
    """Talk with ARTIFACT through its chat template; the conversation is kept from turn to turn."""
    from gemma_deploy.engine import open_engine
    from gemma_deploy.errors import DeployError, UsageError
    from gemma_deploy.runtime import Sampling
    from gemma_deploy.runtime.chat import Conversation
    from gemma_deploy.text import unended

    sampling = Sampling(temperature, top_k, top_p, seed)
    engine = open_engine(artifact, threads=threads)
    conversation = Conversation(engine.tokenizer, system)
    if note := unended(engine.tokenizer, engine.stop_ids):
        log.warning("%s", note)
    loaded = [engine.load_adapter(adapter) for adapter in adapters]
    session = engine.session(sampling)
    session.use(loaded[0] if loaded else None)
    keep_bytes_of_stdin()
    if sys.stdin.isatty():
        click.echo(_greeting(engine), err=True)
    while (text := _read()) is not None:
        if text == RESET:
            session.reset()
            conversation.reset()
            click.echo("forgotten", err=True)
        elif text == HELP:
            click.echo(_help(), err=True)
        elif text:
            try:
                if text.split()[0] == ADAPTER:
                    click.echo(_change(engine, session, loaded, wanted=text.removeprefix(ADAPTER).strip()), err=True)
                    continue
                _turn(session, conversation, _message(text), max_new_tokens, stats)
            except DeployError as error:
                changing = text.startswith(ADAPTER)
                if not sys.stdin.isatty() or not (changing or isinstance(error, UsageError)):
                    raise  # nobody is there to read it and go on
                more = "" if changing else f"\n  or: {RESET} forgets the conversation"
                click.echo(f"error: {error}{more}", err=True)


def _greeting(engine: Engine) -> str:
    """Who is talked with, how long, and how to be helped."""
    manifest = engine.manifest
    model = f"{manifest.model.model_type}, {manifest.model.num_hidden_layers} layers, {manifest.whole_scheme}"
    return (
        f"{manifest.name} ({model}); a conversation has at most {engine.limits.context} tokens\n"
        f"A line is a message. {HELP} lists the commands, {RESET} forgets, {EXIT} leaves."
    )


def _help() -> str:
    return "\n".join(f"{name:<10}{meaning}" for name, meaning in (COMMANDS | BESIDE).items())


def _change(engine: Engine, session: Session, loaded: list[str], *, wanted: str) -> str:
    """Go on with another adapter; what to say about it.

    Args:
        loaded: names of those there are; one that is loaded now is added.
        wanted: a name, a directory, `none`, or nothing at all.

    Raises:
        UsageError, ArtifactError, CheckpointError: there is none like this.
    """
    if wanted == NONE:
        session.use(None)
    elif wanted:
        name = wanted if wanted in loaded else engine.load_adapter(wanted)
        session.use(name)
        loaded += [name] if name not in loaded else []
    names = [f"{name} (speaks)" if name == session.adapter else name for name in loaded]
    return f"adapters: {', '.join(names) or 'none is loaded'}" + ("" if session.adapter else "; the model alone speaks")


def _message(text: str) -> str:
    """What is sent: `//usr` as `/usr`.

    Raises:
        UsageError: it looks like a command, and is none.
    """
    from gemma_deploy.errors import UsageError

    if text.startswith("//"):
        return text[1:]
    if not re.fullmatch(r"/[A-Za-z?]+", text):
        return text
    near = difflib.get_close_matches(text.lower(), COMMANDS, n=1)
    raise UsageError(
        f"{text} is no command" + (f"; did you mean {near[0]}?" if near else ""),
        expected=", ".join(COMMANDS),
        next_step=f"write /{text} to send it as a message",
    )


def _read() -> str | None:
    """The next message; None when there are no more.

    Raises:
        Exit: Ctrl-C, twice where somebody types: the first may have been meant for a reply that had just ended.
    """
    typed = sys.stdin.isatty()
    for last in (False, True):
        try:
            text = input(ASK) if typed else read_stdin(line=True)
            break
        except EOFError:
            return None
        except KeyboardInterrupt:
            click.echo("" if last or not typed else f"\n{AGAIN}", err=True)
            if last or not typed:
                raise click.exceptions.Exit(INTERRUPTED) from None
    if not text and not typed:
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
