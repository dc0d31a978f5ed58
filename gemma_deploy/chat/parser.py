"""A reply, as it comes, into events: whatever pieces it comes in, the events are the same once joined.

Nothing is lost: a marker that makes no sense where it stands, and a tool call that cannot be read, are text with a
reason. Left out are only markers that do, the name of the channel of thinking, and the line feeds beside its markers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from gemma_deploy.chat.arguments import CallError, read_call
from gemma_deploy.chat.events import ChatEvent, Text, Thinking, joined
from gemma_deploy.chat.format import CallMarks, Channel, ChatFormat

NOWHERE = CallMarks("", "", "")
NO_CHANNEL = Channel("", "", "")


class ChatParser:
    """Reads one reply.

    Args:
        form: how the model marks what it says.
        prompt: what the reply follows: some chat templates begin the model's thinking for it.
    """

    def __init__(self, form: ChatFormat, prompt: str = "") -> None:
        channel, call = self._channel, self._call = form.channel or NO_CHANNEL, form.call or NOWHERE
        self._text = _Search((channel.begin, channel.end, call.begin, call.end))
        self._thinking = _Search((channel.begin, channel.end, call.begin))
        self._calling, self._quoting = _Search((call.begin, call.end, call.quote)), _Search((call.quote,))
        self._held, self._place = "", 0  # what came; from `place` on it is not decided yet
        self._body: list[str] = []  # of a tool call, before that
        self._quoted = False  # inside a text of a tool call
        self._found: list[ChatEvent] = []
        self._state: Callable[[], bool] = self._in_text
        if form.channel is not None:
            begins, ends = prompt.rfind(channel.begin), max(prompt.rfind(channel.end), prompt.rfind(form.turn))
            self.feed(prompt[begins:] if begins > ends else "")  # is of the prompt: not said again

    @property
    def thinks(self) -> bool:
        """Whether what came last is of the model's thinking, or of the marker that begins it."""
        return self._state in (self._in_header, self._in_thinking)

    def feed(self, piece: str) -> list[ChatEvent]:
        """Add a piece of the reply; what is known because of it."""
        self._held, self._place = self._held[self._place :] + piece, 0
        while self._state():
            pass
        found, self._found = self._found, []
        return joined(found)

    def end(self) -> list[ChatEvent]:
        """The reply is over; what was held back."""
        held = "".join(self._body) + self._held[self._place :]
        state, self._state = self._state, self._in_text
        self._held, self._place, self._body, self._quoted = "", 0, [], False
        if state == self._in_call:
            return [Text(self._call.begin + held, "the reply ended inside a tool call")]
        if state == self._in_header:
            return [Text(self._channel.begin + held, "the reply ended where a channel began")]
        if state == self._in_thinking:
            return [*([Thinking(held)] if held else []), Thinking("", "the reply ended inside its thinking")]
        return [Text(held)] if held else []

    # Each of these reads on in one state, and says whether there is more to read in the same or in another one.

    def _in_text(self) -> bool:
        before, marker = self._next(self._text)
        if before:
            self._found.append(Text(before))
        if marker in (self._channel.begin, self._call.begin):
            self._state = self._in_header if marker == self._channel.begin else self._in_call
        elif marker is not None:
            self._found.append(Text(marker, f"{marker} ends nothing that has begun"))
        return marker is not None

    def _in_header(self) -> bool:
        """Behind the marker of a channel: its name, and a line feed or, where it is empty, the marker of its end."""
        name = self._channel.name
        wholes = (name + "\n", name + self._channel.end)
        held = self._held[self._place : self._place + max(map(len, wholes))]
        if held.startswith(wholes):
            self._place += len(name) + held.startswith(wholes[0])
            self._state = self._in_thinking
        elif any(whole.startswith(held) for whole in wholes):
            return False
        else:
            self._found.append(Text(self._channel.begin, f"it begins no channel of the name {name!r}"))
            self._state = self._in_text
        return True

    def _in_thinking(self) -> bool:
        before, marker = self._next(self._thinking, hold="\n")  # the last line feed may be the marker's
        if marker == self._channel.end:
            before = before.removesuffix("\n")
            self._state = self._in_text
        if before:
            self._found.append(Thinking(before))
        if marker == self._channel.begin:
            self._found.append(Thinking(marker, "a channel begins inside a channel"))
        elif marker == self._call.begin:
            self._found.append(Thinking("", f"a tool call began before {self._channel.end}"))
            self._state = self._in_call
        return marker is not None

    def _in_call(self) -> bool:
        before, marker = self._next(self._quoting if self._quoted else self._calling)
        self._body.append(before)
        if marker == self._call.quote:
            self._body.append(marker)
            self._quoted = not self._quoted
        elif marker is not None:
            body, self._body = "".join(self._body), []
            if marker == self._call.begin:
                self._found.append(Text(marker + body, "another tool call began before the end of this one"))
            else:
                self._found.append(self._called(body))
                self._state = self._in_text
        return marker is not None

    def _called(self, body: str) -> ChatEvent:
        try:
            return read_call(body, self._call.quote)
        except CallError as error:
            return Text(self._call.begin + body + self._call.end, f"this is no tool call: {error}")

    def _next(self, search: _Search, hold: str = "") -> tuple[str, str | None]:
        """Take the text up to the next marker and that marker, or what is certainly before one and None.

        Args:
            hold: a character that is not taken where it is the last one before what may become a marker.
        """
        begin = self._place
        end, marker = search.find(self._held, begin)
        self._place = end + len(marker or "")
        if marker is None and hold and self._held.endswith(hold, begin, end):
            end = self._place = end - len(hold)
        return self._held[begin:end], marker


class _Search:
    """Finds the first of several markers; those that are "" are none."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = tuple(filter(None, markers))
        self._pattern = re.compile("|".join(map(re.escape, self._markers))) if self._markers else None

    def find(self, text: str, begin: int) -> tuple[int, str | None]:
        """Where a marker stands in `text[begin:]`, and which; without one where the beginning of one stands, and None.

        That is at the end of the text, or is the end where nothing there begins one.
        """
        if self._pattern is None:
            return len(text), None
        if found := self._pattern.search(text, begin):
            return found.start(), found[0]
        longest = max(map(len, self._markers)) - 1
        for place in range(max(begin, len(text) - longest), len(text)):
            if any(marker.startswith(text[place:]) for marker in self._markers):
                return place, None
        return len(text), None


def parse(form: ChatFormat, pieces: Iterable[str], prompt: str = "") -> Iterator[ChatEvent]:
    """The events of a reply that comes in pieces; see `ChatParser`."""
    parser = ChatParser(form, prompt)
    for piece in pieces:
        yield from parser.feed(piece)
    yield from parser.end()
