"""`input` of `/v1/responses`: a text or a list of items, as the messages of a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_deploy.serve.http.errors import ApiError, wrong

TEXTS = ("input_text", "output_text", "reasoning_text", "text")  # kinds of parts that hold text
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
SHOWN = 40
Item = Mapping[str, Any]


def messages_of(given: str | Sequence[Any] | None, instructions: str | None) -> list[dict[str, Any]]:
    """A conversation as `/v1/chat/completions` takes it.

    What the assistant said and called one after the other becomes one message, thinking before it
    `reasoning_content` of that message. Instructions, and messages of the system at the beginning, become one.

    Raises:
        ApiError: there is no item, or one that is not text, or the result of a call that nobody made.
    """
    items: Sequence[Any] = [{"role": "user", "content": given}] if isinstance(given, str) else given or ()
    if not items:
        raise wrong("input", "a text, or a list of items that is not empty")
    reading = _Reading(instructions)
    for place, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise _wrong_item(place, "it is no object")
        reading.read(place, item)
    return reading.messages


class _Reading:
    """Items so far."""

    def __init__(self, instructions: str | None) -> None:
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
        self._calls: set[str] = set()  # that were made
        self._thinking = ""  # before what the assistant says next

    def read(self, place: int, item: Item) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._message(place, item)
        elif kind == "function_call":
            self._call(place, item)
        elif kind == "function_call_output":
            self._result(place, item)
        elif kind == "reasoning":
            self._thinking += _text(place, item.get("content") or [], "content")
        elif kind == "item_reference":
            raise _wrong_item(place, "nothing is stored here: send the item itself in place of item_reference")
        else:
            raise _wrong_item(
                place, f"its type is {str(kind)[:SHOWN]!r}: message, function_call, function_call_output or reasoning"
            )

    def _message(self, place: int, item: Item) -> None:
        role = ROLES.get(str(item.get("role")))
        if role is None:
            raise _wrong_item(place, f"its role is {str(item.get('role'))[:SHOWN]!r}: one of {', '.join(ROLES)}")
        text = _text(place, item.get("content"), "content")
        if role == "assistant":
            last = self._assistant()
            if last.get("tool_calls"):
                last = self._new_assistant()
            last["content"] += text
        elif role == "system" and len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0]["content"] += "\n\n" + text
        else:
            self._thinking = ""
            self.messages.append({"role": role, "content": text})

    def _call(self, place: int, item: Item) -> None:
        number, name, arguments = (item.get(key) for key in ("call_id", "name", "arguments"))
        if not (isinstance(number, str) and isinstance(name, str) and isinstance(arguments, str)):
            raise _wrong_item(place, "call_id, name and arguments are texts")
        function = {"name": name, "arguments": arguments}
        call = {"id": number, "type": "function", "function": function}
        self._assistant().setdefault("tool_calls", []).append(call)
        self._calls.add(number)

    def _result(self, place: int, item: Item) -> None:
        number = item.get("call_id")
        if number not in self._calls:
            raise _wrong_item(place, f"no function_call before it has the call_id {str(number)[:SHOWN]!r}")
        text = _text(place, item.get("output"), "output")
        self.messages.append({"role": "tool", "tool_call_id": number, "content": text})

    def _assistant(self) -> dict[str, Any]:
        """The message that the assistant is at."""
        last = self.messages[-1] if self.messages else {}
        return last if last.get("role") == "assistant" and not self._thinking else self._new_assistant()

    def _new_assistant(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._thinking:
            message["reasoning_content"] = self._thinking
        self._thinking = ""
        self.messages.append(message)
        return message


def _text(place: int, content: Any, key: str) -> str:
    """The text of content: itself, or its parts one behind the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong_item(place, f"its {key} is a text, or a list of parts")
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in (*TEXTS, "refusal") or not isinstance(text, str):
            raise _wrong_item(
                place, f"a part of its {key} has the type {str(kind)[:SHOWN]!r}: nothing but text is read here"
            )
        found.append(text)
    return "".join(found)


def _wrong_item(place: int, message: str) -> ApiError:
    return wrong("input", f"item {place}: {message}")
