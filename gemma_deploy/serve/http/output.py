"""`output` of `/v1/responses`: items out of what a model says, and the events of a stream that tell of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from gemma_deploy.chat import ChatEvent, Text, ToolCall
from gemma_deploy.chat.messages import new_call_id

MESSAGE, REASONING, CALL = "message", "reasoning", "function_call"
PREFIXES = {MESSAGE: "msg", REASONING: "rs", CALL: "fc"}
NAMES = {MESSAGE: "response.output_text", REASONING: "response.reasoning_text"}  # of events
Body = dict[str, Any]


class Output:
    """Items, one for each run of text, of thinking, and each call.

    Attributes:
        items: those that are complete.
    """

    def __init__(self) -> None:
        self.items: list[Body] = []
        self._open: str | None = None  # the kind of the item that is being said
        self._id, self._text, self._logs = "", list[str](), list[Any]()

    def add(self, event: ChatEvent, logs: list[Any]) -> Iterator[Body]:
        """What a stream says of an event.

        Args:
            logs: log-probabilities of the tokens of a text.
        """
        if isinstance(event, ToolCall):
            yield from self.close()
            yield from self._call(event)
            return
        if not event.text:
            return
        kind = MESSAGE if isinstance(event, Text) else REASONING
        if kind != self._open:
            yield from self.close()
            yield from self._begin(kind)
        self._text.append(event.text)
        more: Body = {}
        if kind == MESSAGE:
            self._logs += logs
            more["logprobs"] = logs
        yield self._of_part(f"{NAMES[kind]}.delta", delta=event.text, **more)

    def end(self, status: str) -> Iterator[Body]:
        """What a stream says when nothing more comes.

        Args:
            status: of the item that is being said, where there is one.
        """
        if self._open is None and not self.items:
            yield from self._begin(MESSAGE)
        yield from self.close(status)

    def close(self, status: str = "completed") -> Iterator[Body]:
        """End the item that is being said."""
        if self._open is None:
            return
        kind, text, part = self._open, "".join(self._text), self._part()
        more = {"logprobs": self._logs} if kind == MESSAGE else {}
        yield self._of_part(f"{NAMES[kind]}.done", text=text, **more)
        yield self._of_part("response.content_part.done", part=part)
        item = self._item(kind, status, [part])
        yield self._of_item("response.output_item.done", item)
        self.items.append(item)
        self._open = None

    def _begin(self, kind: str) -> Iterator[Body]:
        self._open, self._id, self._text, self._logs = kind, _new_id(kind), [], []
        yield self._of_item("response.output_item.added", self._item(kind, "in_progress", []))
        yield self._of_part("response.content_part.added", part=self._part())

    def _call(self, event: ToolCall) -> Iterator[Body]:
        self._id = _new_id(CALL)
        arguments = json.dumps(event.arguments, ensure_ascii=False)
        item = {
            "id": self._id, "type": CALL, "status": "completed", "call_id": new_call_id(), "name": event.name,
            "arguments": arguments,
        }  # fmt: skip
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield self._of_item("response.output_item.added", begun)
        place = {"item_id": self._id, "output_index": len(self.items)}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": arguments}
        yield {
            "type": "response.function_call_arguments.done", **place, "name": event.name, "arguments": arguments,
        }  # fmt: skip
        yield self._of_item("response.output_item.done", item)
        self.items.append(item)

    def _part(self) -> Body:
        text = "".join(self._text)
        if self._open == REASONING:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logs)}

    def _item(self, kind: str, status: str, content: list[Body]) -> Body:
        more: Body = {"role": "assistant"} if kind == MESSAGE else {"summary": []}
        return {"id": self._id, "type": kind, "status": status, **more, "content": content}

    def _of_item(self, name: str, item: Body) -> Body:
        return {"type": name, "output_index": len(self.items), "item": item}

    def _of_part(self, name: str, **more: Any) -> Body:
        return {"type": name, "item_id": self._id, "output_index": len(self.items), "content_index": 0, **more}


def _new_id(kind: str) -> str:
    return f"{PREFIXES[kind]}_{uuid.uuid4().hex}"
