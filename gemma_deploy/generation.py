"""What `run` and `chat` share: options of sampling, standard input, a reply on the screen, the line of statistics."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.errors import UsageError

if TYPE_CHECKING:
    from gemma_deploy.chat import ChatEvent
    from gemma_deploy.runtime.generate import GenerationStats

INTERRUPTED = 130
MOST_CHARACTERS = 4 << 20  # of a prompt from standard input: four times what fills the longest context of any Gemma
ENDED = {
    "stop": "the model ended its text",
    "length": "--max-new-tokens is reached",
    "context": "the context is full",
    "cancelled": "cancelled",
    None: "interrupted",
}
OPTIONS = (
    click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, show_default=True, help="Draw from the K most probable; 0 is all."),
    click.option(
        "--top-p", type=float, default=1.0, show_default=True, help="Draw from the most probable that make up P."
    ),
    click.option("--seed", type=int, help="Same seed, same text  [default: another text every time]"),
    click.option("--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="0 takes all cores."),
)


def generation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `Sampling`, --max-new-tokens and --threads."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def read_stdin(*, line: bool = False) -> str:
    """All of standard input, or its next line; "" at its end.

    Raises:
        UsageError: there is more than any context takes (a device never ends).
    """
    read = sys.stdin.readline if line else sys.stdin.read
    text = read(MOST_CHARACTERS + 1)
    if len(text) > MOST_CHARACTERS:
        raise UsageError(
            f"the prompt has more than {MOST_CHARACTERS} characters",
            where="standard input",
            expected="a text that fits into the artifact's context",
            next_step="give a shorter one",
        )
    return text


def keep_bytes_of_stdin() -> None:
    """Have bytes of standard input that are no UTF-8 come through as half characters, which `Tokenizer` refuses."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


class Screen:
    """Shows a reply as it comes: text and tool calls on standard output, thinking and reasons on standard error.

    Args:
        hide_thinking: thinking is not shown; else it is dimmed where standard error is a terminal.
    """

    def __init__(self, *, hide_thinking: bool = False) -> None:
        self._hide, self._thinks = hide_thinking, False
        self._text = ""  # the last piece on standard output where that was text
        self._called = False  # the last thing on standard output was a call

    def show(self, events: Sequence[ChatEvent]) -> Sequence[ChatEvent]:
        """Show events; the same are returned."""
        from gemma_deploy.chat import Thinking, ToolCall

        for event in events:
            if isinstance(event, ToolCall):
                self._end_thinking()
                call = json.dumps({"name": event.name, "arguments": event.arguments}, ensure_ascii=False)
                click.echo(("\n" if self._text and not self._text.endswith("\n") else "") + call)
                self._text, self._called = "", True
                continue
            if isinstance(event, Thinking):
                if event.text and not self._hide:
                    click.echo(click.style(event.text, dim=True), nl=False, err=True)
                    self._thinks = True
            elif event.text:
                self._end_thinking()
                click.echo(event.text, nl=False)
                self._text, self._called = event.text, False
            if event.reason is not None:
                self._end_thinking()
                click.echo(f"note: {event.reason}", err=True)
        return events

    def close(self) -> None:
        """End the last line."""
        self._end_thinking()
        if not self._called:
            click.echo()

    def _end_thinking(self) -> None:
        if self._thinks:
            click.echo(err=True)
        self._thinks = False


def summary(done: GenerationStats) -> str:
    """One line: how many tokens, how fast, why it ended."""
    ahead = f" ({(len(done.tokens) - 1) / done.steps:.2f} a step)" if done.steps else ""
    return (
        f"loading {done.load_seconds:.2f} s; {done.prompt_tokens} prompt tokens in {done.prefill_seconds:.2f} s; "
        f"{len(done.tokens)} tokens at {done.tokens_per_second:.1f} tokens/s{ahead}; {ENDED[done.finish]}"
    )
