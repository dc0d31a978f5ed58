"""The inside of a tool call, `call:NAME{key:value,...}`, as a name and JSON values.

Values are numbers, `true`, `false`, `null`, texts between quote markers, `[...]` and `{key:value,...}`. Keys stand bare
or quoted. What models write besides is taken too where it can mean only one thing: white space around it all, JSON's
own quotes, and `None` for null, which is what early chat templates show them. Everything else is refused with a reason.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from gemma_deploy.chat.events import ToolCall

DEEPEST = 64  # objects and lists inside each other
SHOWN = 24  # characters of what is wrong
_SPACE = re.compile(r"[ \t\r\n]*")
_HEAD = re.compile(r"[ \t\r\n]*call:[ \t]*([\w.:/-]+)[ \t\r\n]*(?=\{)")
_KEY = re.compile(r'[^\s:,{}\[\]"][^:,{}\[\]"]*')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?(?![\w.])")
_WORD = re.compile(r"[A-Za-z_]+")
_JSON = json.JSONDecoder(strict=False)  # takes line feeds inside a text
_WORDS = {"true": True, "false": False, "null": None, "None": None}


class CallError(Exception):
    """What is wrong with a tool call."""


def read_call(body: str, quote: str) -> ToolCall:
    """A tool call.

    Args:
        body: what stands between the markers around it.
        quote: the marker before and after a text.

    Raises:
        CallError: saying what is wrong.
    """
    head = _HEAD.match(body)
    if head is None:
        raise CallError(f"it does not begin with call:NAME{{, but with {_shown(body, 0)}")
    reader = _Reader(body, head.end(), quote)
    arguments = reader.object(1)
    reader.space()
    if reader.place < len(body):
        raise CallError(f"{_shown(body, reader.place)} stands behind its arguments")
    return ToolCall(head[1], arguments)


def _shown(body: str, place: int) -> str:
    return repr(body[place : place + SHOWN]) if place < len(body) else "its end"


class _Reader:
    """Reads values one behind the other; `place` is where the next one begins."""

    def __init__(self, body: str, place: int, quote: str) -> None:
        self.body, self.place, self.quote = body, place, quote

    def space(self) -> None:
        found = _SPACE.match(self.body, self.place)
        assert found is not None
        self.place = found.end()

    def object(self, depth: int) -> dict[str, Any]:
        """`{key:value,...}`; the brace is there."""
        found: dict[str, Any] = {}
        self.place += 1
        if self._took("}"):
            return found
        while True:
            self.space()
            key = self._key()
            if key in found:
                raise CallError(f"the key {key[:SHOWN]!r} is there twice")
            self._take(":", f"behind the key {key[:SHOWN]!r}")
            found[key] = self.value(depth)
            if self._took("}"):
                return found
            self._take(",", "or } behind a value")

    def array(self, depth: int) -> list[Any]:
        """`[value,...]`; the bracket is there."""
        found: list[Any] = []
        self.place += 1
        if self._took("]"):
            return found
        while True:
            found.append(self.value(depth))
            if self._took("]"):
                return found
            self._take(",", "or ] behind a value")

    def value(self, depth: int) -> Any:
        """Any value; `depth` objects and lists are around it."""
        self.space()
        if self.body.startswith(("{", "["), self.place):
            if depth == DEEPEST:
                raise CallError(f"more than {DEEPEST} objects and lists are inside each other")
            return self.object(depth + 1) if self.body[self.place] == "{" else self.array(depth + 1)
        if (text := self._text()) is not None:
            return text
        if number := _NUMBER.match(self.body, self.place):
            self.place = number.end()
            return _number(number)
        word = _WORD.match(self.body, self.place)
        if word is None or word[0] not in _WORDS:
            raise CallError(f"a value is expected, not {_shown(self.body, self.place)}")
        self.place = word.end()
        return _WORDS[word[0]]

    def _key(self) -> str:
        if (text := self._text()) is not None:
            return text
        found = _KEY.match(self.body, self.place)
        if found is None or self.quote in found[0]:
            raise CallError(f"a key is expected, not {_shown(self.body, self.place)}")
        self.place = found.end()
        return found[0].rstrip()

    def _text(self) -> str | None:
        """A quoted text; None where there is none."""
        if self.body.startswith(self.quote, self.place):
            begin = self.place + len(self.quote)
            end = self.body.find(self.quote, begin)
            if end < 0:
                raise CallError(f"the text {_shown(self.body, begin)} has no end")
            self.place = end + len(self.quote)
            return self.body[begin:end]
        if self.body.startswith('"', self.place):
            try:
                text, self.place = _JSON.raw_decode(self.body, self.place)
            except json.JSONDecodeError as error:
                raise CallError(f"the text {_shown(self.body, self.place)} is no JSON") from error
            return str(text)
        return None

    def _took(self, character: str) -> bool:
        self.space()
        if not self.body.startswith(character, self.place):
            return False
        self.place += 1
        return True

    def _take(self, character: str, where: str) -> None:
        if not self._took(character):
            raise CallError(f"{character} {where} is expected, not {_shown(self.body, self.place)}")


def _number(found: re.Match[str]) -> int | float:
    try:
        number = int(found[0]) if found[1] is None and found[2] is None else float(found[0])
    except ValueError as error:  # more digits than Python converts
        raise CallError(f"a number has {len(found[0])} digits") from error
    if isinstance(number, float) and not math.isfinite(number):
        raise CallError(f"{found[0][:SHOWN]} is larger than any number of JSON")
    return number
