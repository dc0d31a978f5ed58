"""What a model's reply is made of: text, thinking, tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Text:
    """Text for the user.

    Args:
        text: a piece of it, or all; "" where there is only something to say about it.
        reason: of text that looks like more than text, and is not: what is wrong with it. None of ordinary text.
    """

    text: str
    reason: str | None = None


@dataclass(frozen=True)
class Thinking:
    """What the model thinks before it answers.

    Args:
        text: a piece of it, or all; "" where there is only something to say about it.
        reason: what is wrong with it, such as that it has no end; None of ordinary thinking.
    """

    text: str
    reason: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called.

    Args:
        name: of the function.
        arguments: by name, as JSON has them: text, numbers, booleans, None, lists, objects.
    """

    name: str
    arguments: dict[str, Any]


ChatEvent = Text | Thinking | ToolCall


def joined(events: Iterable[ChatEvent]) -> list[ChatEvent]:
    """The same reply in the fewest events, however it was cut into pieces.

    Neighbours of ordinary text become one, and so do neighbours of ordinary thinking.
    """
    found: list[ChatEvent] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Text | Thinking) and type(last) is type(event) and event.reason is None:
            assert isinstance(last, Text | Thinking)
            if last.reason is None:
                found[-1] = replace(last, text=last.text + event.text)
                continue
        found.append(event)
    return found
