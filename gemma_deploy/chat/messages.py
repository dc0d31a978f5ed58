"""Replies as messages of the OpenAI API, whole and in deltas, and such messages as chat templates take them."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gemma_deploy.chat.events import ChatEvent, Text, Thinking, ToolCall
from gemma_deploy.errors import UsageError
from gemma_deploy.reading import NotJsonError, parse_json

Message = Mapping[str, Any]
log = logging.getLogger(__name__)
_CALLS, _RESPONSES, _ROLE, _TOOL = "tool_calls", "tool_responses", "role", "tool"
_THINKING = ("reasoning_content", "reasoning", "thinking")  # names under which a message may have it


def new_call_id() -> str:
    """An id that no other tool call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


class Deltas:
    """Events as `choices[0].delta` of chunks.

    Args:
        new_id: gives each tool call its id.
    """

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        self._new_id, self._calls = new_id, 0

    def of(self, event: ChatEvent) -> dict[str, Any] | None:
        """`content`, `reasoning_content` or one of `tool_calls`, which is whole; None of an event that has no text."""
        if isinstance(event, ToolCall):
            call = {"index": self._calls, **_call(event, self._new_id())}
            self._calls += 1
            return {_CALLS: [call]}
        key = "content" if isinstance(event, Text) else "reasoning_content"
        return {key: event.text} if event.text else None


def reply_message(events: Iterable[ChatEvent], new_id: Callable[[], str] = new_call_id) -> dict[str, Any]:
    """A reply as a message of the assistant.

    Args:
        events: of the whole reply.
        new_id: gives each tool call its id.

    Returns:
        `content` (None where there is nothing but calls and thinking), and, where there are any, `reasoning_content`
        and `tool_calls`, whose arguments are JSON as text.
    """
    found = list(events)
    content, thinking = ("".join(one.text for one in found if isinstance(one, kind)) for kind in (Text, Thinking))
    calls = [_call(one, new_id()) for one in found if isinstance(one, ToolCall)]
    message: dict[str, Any] = {_ROLE: "assistant", "content": content or (None if calls or thinking else "")}
    if thinking:
        message["reasoning_content"] = thinking
    return message | ({_CALLS: calls} if calls else {})


def _call(event: ToolCall, number: str) -> dict[str, Any]:
    arguments = json.dumps(event.arguments, ensure_ascii=False)
    return {"id": number, "type": "function", "function": {"name": event.name, "arguments": arguments}}


def for_template(messages: Sequence[Message], template: str) -> list[Message]:
    """Messages of the OpenAI API as a chat template of a Gemma takes them.

    Arguments of tool calls become objects, and results of tools get the name of their function. What Gemma 4's own
    templates have no place for goes elsewhere: results into the message that holds the calls where there are no
    messages of tools (the first revision), and text before calls into a message of its own. Every published revision
    writes such text behind the results, closes the turn there and leaves the model without one to go on with. Three of
    them have no place for that message either, so that the text is left out, with a warning.

    Args:
        messages: others, and those that are right already, are left as they are.
        template: as text.

    Raises:
        UsageError: the arguments of a tool call are no JSON object.
    """
    names: dict[str, Any] = {}
    found: list[Any] = []
    within = _RESPONSES in template and "tool_call_id" not in template
    for message in messages:
        if not isinstance(message, Mapping):
            found.append(message)  # which the template refuses
        elif isinstance(calls := message.get(_CALLS), Sequence) and calls:
            found += _apart({**message, _CALLS: [_decoded(one) for one in calls]}, template)
            names |= {str(one.get("id")): _function(one).get("name") for one in calls if isinstance(one, Mapping)}
        elif message.get(_ROLE) != _TOOL:
            found.append(message)
        else:
            name = message.get("name") or names.get(str(message.get("tool_call_id")))
            if within and found and isinstance(found[-1], Mapping) and found[-1].get(_CALLS):
                response = {"name": name, "response": message.get("content")}
                found[-1] = {**found[-1], _RESPONSES: [*found[-1].get(_RESPONSES, ()), response]}
            else:
                found.append({**message, "name": name} if name else message)
    return found


def _apart(message: dict[str, Any], template: str) -> list[Message]:
    """A message with tool calls, and before it one with the text that it has."""
    content = message.get("content")
    if _RESPONSES not in template or not (content.strip() if isinstance(content, str) else content):
        return [message]
    calls = {**message, "content": ""}
    if "continue_same_model_turn" in template and "continues_into_next" not in template:
        log.warning("the chat template has no place for text before tool calls: %r is left out", str(content)[:80])
        return [calls]
    text = {key: value for key, value in message.items() if key != _CALLS}
    return [text, {key: value for key, value in calls.items() if key not in _THINKING}]


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def _decoded(call: Any) -> Any:
    """A tool call whose arguments are an object."""
    if not isinstance(call, Mapping) or not isinstance(text := _function(call).get("arguments"), str):
        return call
    try:
        value = parse_json(text or "{}")
    except NotJsonError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(
            f"the arguments of a call of {str(_function(call).get('name'))[:80]!r} are no JSON object: {text[:80]!r}",
            expected='such as {"city": "Oslo"}, or that as text',
            next_step="send back the arguments as they were received",
        )
    return {**call, "function": {**_function(call), "arguments": value}}
