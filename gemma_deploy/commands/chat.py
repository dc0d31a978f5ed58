"""`gemma-deploy chat`: turns with an artifact."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from dataclasses import dataclass, field
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
    from gemma_deploy.chat import ChatEvent
    from gemma_deploy.runtime.chat import Conversation, Turn
    from gemma_deploy.runtime.engine import Engine, Session

log = logging.getLogger(__name__)
ASK = "> "
HELP, RESET, ADAPTER, RESULT, EXIT = "/help", "/reset", "/adapter", "/result", "/exit"
NONE = "none"  # /adapter none
# Words of Jinja's expressions: no template gives a value such a name, and most are never read as one.
WORDS_OF_TEMPLATES = frozenset(
    ("and", "else", "if", "in", "is", "not", "or", "true", "false", "none", "True", "False", "None", "self")
)
COMMANDS = {
    HELP: "this list",
    ADAPTER: f"the adapters there are; {ADAPTER} NAME goes on with another, {ADAPTER} {NONE} with the model alone",
    RESULT: f"{RESULT} TEXT is what the function gave that the model has called; of several calls, in their order",
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
  gemma-deploy chat workspace/NAME --think -n 1000
  gemma-deploy chat workspace/NAME --tools tools.json
  printf "Hello\\nWho are you?\\n" | gemma-deploy chat workspace/NAME

A line is a message; /help lists the commands, /reset forgets the conversation, /exit or Ctrl-D leaves. Ctrl-C stops a
reply, and leaves when pressed twice while you type. Replies go to standard output, a tool call as a line of JSON;
thinking, dimmed, and everything else go to standard error.
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
@click.option("--tools", type=PATH, metavar="FILE", help="JSON list of functions that the model may call.")
@click.option(
    "--think/--no-think",
    default=None,
    help="Have the model think first, or not  [default: as its chat template has it]",
)
@click.option("--hide-thinking", is_flag=True, help="Do not show what the model thinks.")
@click.option(
    "--template-arg",
    "template_args",
    type=NAME,
    multiple=True,
    metavar="NAME=VALUE",
    help="A name of the chat template: JSON, or else text. Repeatable.",
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
    tools: Path | None,
    think: bool | None,
    hide_thinking: bool,
    template_args: tuple[str, ...],
    stats: bool,
) -> None:
    """Talk with ARTIFACT through its chat template; the conversation is kept from turn to turn."""
    from gemma_deploy.engine import open_engine
    from gemma_deploy.errors import DeployError, UsageError
    from gemma_deploy.runtime import Sampling
    from gemma_deploy.runtime.chat import Conversation
    from gemma_deploy.text import unended

    sampling = Sampling(temperature, top_k, top_p, seed)
    described, names = _tools(tools) if tools else None, _names(template_args, think)
    engine = open_engine(artifact, threads=threads)
    conversation = Conversation(engine.tokenizer, system, tools=described, names=names)
    if note := unended(engine.tokenizer, engine.stop_ids):
        log.warning("%s", note)
    loaded = [engine.load_adapter(adapter) for adapter in adapters]
    session = engine.session(sampling)
    session.use(loaded[0] if loaded else None)
    talk = _Talk(engine, session, conversation, loaded, max_new_tokens, hide_thinking, stats)
    keep_bytes_of_stdin()
    if sys.stdin.isatty():
        click.echo(_greeting(engine), err=True)
    while (text := _read()) is not None:
        try:
            talk.line(text)
        except DeployError as error:
            changing = text.startswith(ADAPTER)
            if not sys.stdin.isatty() or not (changing or isinstance(error, UsageError)):
                raise  # nobody is there to read it and go on
            more = "" if changing else f"\n  or: {RESET} forgets the conversation"
            click.echo(f"error: {error}{more}", err=True)


@dataclass
class _Talk:
    """What goes on between somebody and a model."""

    engine: Engine
    session: Session
    conversation: Conversation
    loaded: list[str]  # adapters
    max_new_tokens: int
    hide_thinking: bool
    stats: bool
    given: list[str] = field(default_factory=list)  # results of tool calls, until there is one of each

    def line(self, text: str) -> None:
        """Do what a line says.

        Raises:
            DeployError: it cannot be done.
        """
        word, _, rest = text.partition(" ")
        if text == RESET:
            self.session.reset()
            self.conversation.reset()
            self.given.clear()
            click.echo("forgotten", err=True)
        elif text == HELP:
            click.echo(_help(), err=True)
        elif word == ADAPTER:
            click.echo(_change(self.engine, self.session, self.loaded, wanted=rest.strip()), err=True)
        elif word == RESULT:
            self.result(rest.strip())
        elif text:
            self.turn(self.conversation.turn(_message(text)))

    def result(self, content: str) -> None:
        """Take what a function gave; the model goes on when there is a result of every call."""
        waiting = self.conversation.waiting
        self.given.append(content)
        if len(self.given) < len(waiting):
            click.echo(f"waiting for the result of {waiting[len(self.given)]}", err=True)
            return
        given, self.given = self.given, []
        self.turn(self.conversation.results(given))

    def turn(self, turn: Turn) -> None:
        """One message and its reply; what was said before Ctrl-C is kept."""
        from gemma_deploy.chat import ChatParser
        from gemma_deploy.errors import DeployError
        from gemma_deploy.runtime.generate import GenerationStats

        if turn.again:
            self.session.reset()
            self.conversation.unread()  # until there is a reply: this one may be refused
        done, said = GenerationStats(), ""
        events: list[ChatEvent] = []
        parser = ChatParser(self.engine.chat_format, turn.text)
        pieces = self.session.reply(turn.ids, max_new_tokens=self.max_new_tokens, shown=self.engine.markers, stats=done)
        screen = Screen(hide_thinking=self.hide_thinking)
        try:
            for piece in pieces:
                said += piece
                events += screen.show(parser.feed(piece))
        except KeyboardInterrupt:
            pass
        except DeployError:  # a model that overflows: what the session has now is no conversation
            self.conversation.unread()
            raise
        events += screen.show(parser.end())
        screen.close()
        self.conversation.replied(turn, said, events)
        if self.conversation.waiting:
            click.echo(f"waiting for the result of {self.conversation.waiting[0]}: {RESULT} TEXT", err=True)
        if self.stats:
            click.echo(summary(done), err=True)


def _tools(file: Path) -> list[dict[str, Any]]:
    """The functions that a file describes.

    Raises:
        UsageError: it cannot be read, or describes none; all that is wrong with them at once.
    """
    from gemma_deploy import reading
    from gemma_deploy.errors import UsageError

    expected = '[{"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema}}, ...]'
    kind = reading.FileKind(
        UsageError, expected, "write the functions as the OpenAI API has them", unique_keys=True, finite=True
    )
    value = reading.read_json(file, kind)
    tools = value if isinstance(value, list) else [value]
    found, problems = [], [] if tools else ["the list is empty"]
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            problems.append(f"[{number}]: no function with a name")
            continue
        if not isinstance(function.get("parameters", {}), dict):
            problems.append(f"[{number}] {function['name'][:80]}: parameters are no JSON schema")
        if not isinstance(function.get("description", ""), str):
            problems.append(f"[{number}] {function['name'][:80]}: the description is no text")
        found.append({"type": "function", "function": {"description": "", **function}})
    if problems:
        raise UsageError(
            "describes no functions", where=str(file), problems=problems, expected=expected, next_step=kind.next_step
        )
    return found


def _names(given: tuple[str, ...], think: bool | None) -> dict[str, Any]:
    """Names for the chat template.

    Raises:
        UsageError: one is no NAME=VALUE.
    """
    from gemma_deploy.errors import UsageError
    from gemma_deploy.reading import NotJsonError, parse_json

    names: dict[str, Any] = {}
    for one in given:
        name, found, value = one.partition("=")
        if not found or not name.isidentifier() or name in WORDS_OF_TEMPLATES:
            raise UsageError(
                f"--template-arg {one[:80]!r} is none",
                expected="NAME=VALUE, such as enable_thinking=true; NAME is no word of the template language",
                next_step="name what the chat template reads, an equals sign, and JSON or a text",
            )
        try:
            names[name] = parse_json(value)
        except NotJsonError:
            names[name] = value
    return names if think is None else names | {"enable_thinking": think}


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
