"""How a model marks what it says: the markers of turns, of its thinking and of tool calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Channel:
    """What stands around the model's thinking: `begin`, the channel's name, a line feed, the thinking, `end`.

    Args:
        name: of the channel that holds thinking.
    """

    begin: str
    end: str
    name: str


@dataclass(frozen=True)
class CallMarks:
    """What stands around a tool call: `begin`, `call:NAME{key:value,...}`, `end`.

    Args:
        quote: stands before and after every text among the values; inside, no other marker counts.
    """

    begin: str
    end: str
    quote: str


@dataclass(frozen=True)
class ChatFormat:
    """The way in which a family of models writes its turns.

    Args:
        name: as artifacts record it.
        sign: what a chat template of this format spells, and none of the formats after it in `FORMATS` has.
        turn: how a turn begins.
        stops: tokens that end a reply besides the end of a turn, whether or not the files of the model say so.
        channel: of thinking; call: of tool calls. None: the model has none.
    """

    name: str
    sign: str
    turn: str
    stops: tuple[str, ...] = ()
    channel: Channel | None = None
    call: CallMarks | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """The special tokens whose text a parser needs to see; the others are no part of a reply."""
        channel = () if self.channel is None else (self.channel.begin, self.channel.end)
        return channel if self.call is None else (*channel, self.call.begin, self.call.end, self.call.quote)
