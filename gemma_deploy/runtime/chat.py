"""Conversations: which tokens a message adds to those the model has seen; an engine's session goes on with them.

What a model said stays as the tokens it chose, which are not always those its text would be given again. Where the chat
template shows the reply otherwise than it was said (most leave earlier thinking out), all of it is read again.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_deploy.chat import ChatEvent, Text
from gemma_deploy.chat.messages import for_template, reply_message
from gemma_deploy.errors import UsageError
from gemma_deploy.text import Tokenizer

NO_SYSTEM = "leave --system out, and say it in the first message"


@dataclass(frozen=True)
class Turn:
    """What the model is to read before it replies.

    Args:
        ids: token ids.
        again: they are the whole conversation: what a session has of it is to be forgotten before.
        text: the whole conversation as it ends before the reply.
        messages: those that are new.
    """

    ids: list[int]
    again: bool
    text: str
    messages: tuple[dict[str, Any], ...]


class Conversation:
    """The turns so far, and the tokens of the next one.

    Args:
        system: what the model is told beforehand.
        tools: functions that the model may call, as `ChatTemplate.render` takes them.
        names: more names for the chat template, such as `enable_thinking`.

    Raises:
        UsageError: the model has no chat template, or its template has no place for `system`, `tools` or a name.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        system: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._tools, self._names = tokenizer, tools or None, dict(names or {})
        self._system = [{"role": "system", "content": system}] if system else []
        self.reset()
        mark = uuid.uuid4().hex
        trial, first = [{"role": "system", "content": mark}] if system else [], {"role": "user", "content": "-"}
        try:
            shown = self._rendered([*trial, first])
        except UsageError as error:
            if system:
                self._rendered([first])  # what is wrong without it too is said as it is
                error = UsageError(error.what, where=error.where, next_step=NO_SYSTEM)
            raise error from None
        if system and mark not in shown:
            raise UsageError(
                "the chat template leaves a system message out", where=str(tokenizer.path), next_step=NO_SYSTEM
            )
        self._refuse_what_is_left_out(first)

    def _refuse_what_is_left_out(self, first: dict[str, str]) -> None:
        """See that tools and names make a difference to the template."""
        where, source = str(self._tokenizer.path), self._tokenizer.chat.source(tools=self._tools is not None)
        unknown = [name for name in self._names if not re.search(rf"\b{re.escape(name)}\b", source)]
        if unknown:
            raise UsageError(
                f"the chat template does not know {', '.join(unknown)}",
                where=where,
                next_step="leave it out: this model has no such choice",
            )
        if self._tools:
            tool: dict[str, Any] = {
                "name": uuid.uuid4().hex,
                "description": "-",
                "parameters": {"type": "object", "properties": {}},
            }
            if str(tool["name"]) not in self._rendered([first], tools=[{"type": "function", "function": tool}]):
                raise UsageError(
                    "the chat template leaves tools out",
                    where=where,
                    next_step="describe them in the first message, or take a model that was trained to call tools",
                )

    @property
    def waiting(self) -> list[str]:
        """Names of the functions that the last reply calls, whose results the model waits for."""
        last = self._turns[-1] if self._turns else {}
        return [call["function"]["name"] for call in last.get("tool_calls", [])]

    def ask(self, text: str) -> list[int]:
        """Tokens that a message adds to a conversation of text, those that end the reply before it included.

        The conversation is as it was.

        Raises:
            UsageError: the chat template refuses the messages, or leaves replies out.
        """
        if not self._turns:
            return self._tokenizer.encode(self._rendered(self._with({"role": "user", "content": text})))
        return self._tokenizer.encode_more(self._around_reply(text)[1])

    def turn(self, text: str) -> Turn:
        """What a message makes the model read. The conversation is as it was.

        Raises:
            UsageError: as `ask`; or tool calls wait for their results.
        """
        if self.waiting:
            raise UsageError(
                f"the model waits for {len(self.waiting)} result(s) of its tool calls: {', '.join(self.waiting)}",
                next_step="give the results first",
            )
        message = {"role": "user", "content": text}
        if self._turns and self._said_text:
            before, after = self._around_reply(text)
            if before == self._before:  # the template shows what was there before the reply as the model has read it
                whole = self._rendered(self._with(message))
                return Turn(self._tokenizer.encode_more(after), False, whole, (message,))
        return self._read((message,))

    def results(self, contents: Sequence[str]) -> Turn:
        """What the results of the last reply's tool calls make the model read. The conversation is as it was.

        Args:
            contents: one of each call, in their order.

        Raises:
            UsageError: there are more or fewer calls, or the chat template refuses the results.
        """
        calls = self._turns[-1]["tool_calls"] if self.waiting else []
        if len(calls) != len(contents) or not calls:
            raise UsageError(
                f"there are {len(contents)} result(s) for {len(calls)} tool call(s) of the last reply",
                expected="one of each call, in their order",
            )
        return self._read(
            tuple(
                {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": content}
                for call, content in zip(calls, contents, strict=True)
            )
        )

    def answered(self, text: str, reply: str) -> None:
        """Add a message and the model's reply, which are text, to the conversation."""
        self._turns += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        self._before, self._heard, self._said_text = "", "", True

    def replied(self, turn: Turn, said: str, events: Sequence[ChatEvent]) -> None:
        """Add a turn and the model's reply to the conversation.

        Args:
            said: as the model said it, with its markers; events: what that is.
        """
        reply = reply_message(events)
        self._turns += [*turn.messages, reply | {"content": reply["content"] or ""}]
        self._before, self._heard = turn.text, turn.text + said
        self._said_text = all(isinstance(event, Text) for event in events)

    def unread(self) -> None:
        """A session has lost what it had of the conversation: the next turn is all of it."""
        self._before = self._heard = ""

    def reset(self) -> None:
        """Forget the turns; what the model is told beforehand stays."""
        self._turns: list[Mapping[str, Any]] = []
        self._before = ""  # what the template made of everything before the last reply
        self._heard, self._said_text = "", True  # with the reply as it was said; whether that is text and nothing else

    def _with(self, *messages: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [*self._system, *self._turns, *messages]

    def _around_reply(self, text: str) -> tuple[str, str]:
        """What the template puts before and behind the last reply when another message follows, whatever that was."""
        mark = uuid.uuid4().hex
        reply = {"role": "assistant", "content": mark}
        rendered = self._rendered([*self._system, *self._turns[:-1], reply, {"role": "user", "content": text}])
        before, found, after = rendered.rpartition(mark)
        if not found:
            raise UsageError("the chat template leaves replies out", where=str(self._tokenizer.path))
        return before, after

    def _read(self, messages: tuple[dict[str, Any], ...]) -> Turn:
        """The rest of the conversation where it goes on as it was said, and all of it where it does not."""
        text = self._rendered(self._with(*messages))
        if self._heard and text.startswith(self._heard):
            return Turn(self._tokenizer.encode_more(text[len(self._heard) :]), False, text, messages)
        return Turn(self._tokenizer.encode(text), True, text, messages)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        tools = tools or self._tools
        taken = for_template(messages, self._tokenizer.chat.source(tools=tools is not None))
        return self._tokenizer.render_chat(taken, tools=tools, names=self._names)
