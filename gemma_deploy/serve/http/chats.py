"""`/v1/chat/completions`: conversations are answered, with thinking and tool calls apart from the text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_deploy.chat import ChatEvent, ChatParser, ToolCall
from gemma_deploy.chat.messages import Deltas, for_template, reply_message
from gemma_deploy.errors import UsageError
from gemma_deploy.serve.guiding import Guide
from gemma_deploy.serve.http.completions import usage_of
from gemma_deploy.serve.http.errors import told, wrong
from gemma_deploy.serve.http.fields import ChatFields
from gemma_deploy.serve.http.served import Served
from gemma_deploy.serve.http.speech import Piece, Speech, Token
from gemma_deploy.serve.http.streaming import merged
from gemma_deploy.serve.http.tools import CHOICE, tool_use
from gemma_deploy.serve.request import Request


@dataclass(frozen=True)
class Heard:
    """What came of one piece of a text.

    Args:
        events: that are certain now; logs: log-probabilities of the token, where it is of the text.
        thought: whether the token is of the model's thinking, its markers among it.
    """

    piece: Piece
    events: list[ChatEvent]
    logs: list[dict[str, Any]]
    thought: bool


def rendered(
    served: Served,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    names: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the text that the model is to continue.

    Special tokens that a message spells become tokens, as with transformers' `apply_chat_template`.

    Raises:
        ApiError: the chat template refuses it.
    """
    tokenizer = served.tokenizer
    try:
        taken = for_template(messages, tokenizer.chat.source(tools=tools is not None))
        return tokenizer.render_chat(taken, tools=tools, names=names)
    except UsageError as error:
        raise told(error, "messages") from None


async def chat_of(served: Served, fields: ChatFields, name: str) -> Chat:
    """A conversation that is being answered.

    Args:
        name: of the model, as it was asked for.

    Raises:
        ApiError: it cannot be.
    """
    if not fields.messages:
        raise wrong("messages", "one message at least")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise wrong("top_logprobs", "is given without logprobs: true")
    use, engine = tool_use(fields), served.engine
    prompt = rendered(served, fields.messages, tools=use.shown, names=fields.chat_template_kwargs)
    begun = ChatParser(engine.chat_format, prompt).thinks
    may = bool((fields.chat_template_kwargs or {}).get("enable_thinking"))
    asked = fields.grammar()
    thinking = "began" if begun else "may" if may else ""
    of_text = asked is not None and asked[1] == "response_format"  # a call is none
    schema = asked[0].given if asked is not None and of_text else None
    calls = use.grammar(engine.chat_format, engine.markers, thinking=thinking, schema=schema)
    if calls is not None:
        if asked is not None and not of_text:
            raise wrong(asked[1], f"{CHOICE} says already what the answer has to follow")
        asked = calls, CHOICE if use.forced is not None else "response_format"
    return Chat(served, fields, name, prompt=prompt, guide=await served.guide(asked))


class Chat:
    """One request, and its answer; see `Completion`.

    Args:
        prompt: the conversation as text.
    """

    def __init__(
        self, served: Served, fields: ChatFields, name: str, *, prompt: str, guide: Guide | None = None
    ) -> None:
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._served, self._fields, self._name = served, fields, name
        stops, self._prompt = fields.stops(), prompt
        try:
            ids = served.encode(self._prompt, special=True)
        except UsageError as error:
            raise told(error, "messages") from None
        self.prompt_tokens = len(ids)
        most = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
        top = (fields.top_logprobs or 0) if fields.logprobs else None
        requests = [
            Request(
                ids,
                fields.choice(served.vocabulary, place),
                served.context if most is None else most,
                fields.stop_ids(served.stop_ids, served.vocabulary, guided=guide is not None),
                top,
                guide=None if guide is None else guide.copy(),
            )
            for place in range(fields.n or 1)
        ]
        self.asked = served.ask(requests, "messages")
        self.speeches = [Speech(served, one, stops=stops, shown=served.engine.markers) for one in self.asked]

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return usage_of(self.prompt_tokens, self.speeches, len(self.speeches))

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for index, speech in enumerate(self.speeches):
            events, logs, last = list[ChatEvent](), list[Any](), Piece("")
            async for heard in self.heard(speech):
                events += heard.events
                logs += heard.logs
                last = heard.piece
            choices.append(
                {
                    "index": index,
                    "message": reply_message(events),
                    "logprobs": {"content": logs} if self._fields.logprobs else None,
                    "finish_reason": _finish(last, any(isinstance(one, ToolCall) for one in events)),
                    "stop_reason": last.stop,
                }
            )
        return self._body("chat.completion", choices, usage=self.usage())

    async def chunks(self) -> AsyncIterator[Mapping[str, Any]]:
        """The answer in pieces."""
        async for body in merged([self._chunks_of(index, speech) for index, speech in enumerate(self.speeches)]):
            yield body
        if self._fields.with_usage:
            yield self._body("chat.completion.chunk", [], usage=self.usage())

    async def _chunks_of(self, index: int, speech: Speech) -> AsyncIterator[Mapping[str, Any]]:
        await speech.begin()
        deltas, called = Deltas(), False
        yield self._chunk(index, {"role": "assistant", "content": ""}, [])
        async for heard in self.heard(speech):
            piece, logs, counted = heard.piece, heard.logs, not self._fields.ignore_eos
            for event in heard.events:
                called = called or isinstance(event, ToolCall)
                if (delta := deltas.of(event)) is not None:
                    yield self._chunk(index, delta, logs)
                    logs, counted = [], True
            if piece.finish is not None:
                yield self._chunk(index, {}, logs, piece, called)
            elif logs or not counted:  # who measures counts pieces
                yield self._chunk(index, {"content": ""}, logs)

    def _chunk(
        self, index: int, delta: Mapping[str, Any], logs: list[Any], last: Piece | None = None, called: bool = False
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logs} if self._fields.logprobs and logs else None,
            "finish_reason": None if last is None else _finish(last, called),
        }
        if last is not None:
            choice["stop_reason"] = last.stop
        return self._body("chat.completion.chunk", [choice])

    async def heard(self, speech: Speech) -> AsyncIterator[Heard]:
        """One of the texts, taken apart.

        Raises:
            ApiError: it fails on the way.
        """
        parser = ChatParser(self._served.engine.chat_format, self._prompt)
        async for piece in speech.pieces():
            before = parser.thinks
            events = parser.feed(piece.text)
            thought = before or parser.thinks
            if piece.finish is not None:
                events += parser.end()
            yield Heard(piece, events, self._logs(piece), thought)

    def _logs(self, piece: Piece) -> list[dict[str, Any]]:
        """Log-probabilities of a piece's token, where it is of the text."""
        token = piece.token
        if token is None or token.scores is None or token.id in self.asked[0].request.stop_ids:
            return []
        return [self._log(token)]

    def _log(self, token: Token) -> dict[str, Any]:
        scores = token.scores
        assert scores is not None
        top = zip(scores.ids[0].tolist(), scores.top[0].tolist(), strict=True)
        return {
            **self._entry(token.id, float(scores.own[0])),
            "top_logprobs": [self._entry(one, log) for one, log in top],
        }

    def _entry(self, token: int, log: float) -> dict[str, Any]:
        return {"token": self._served.text_of(token), "logprob": log, "bytes": self._served.bytes_of(token)}

    def _body(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = {"id": self.id, "object": kind, "created": self.created, "model": self._name, "choices": choices}
        return body if usage is None else {**body, "usage": usage}


def _finish(last: Piece, called: bool) -> str | None:
    return "tool_calls" if called and last.finish == "stop" else last.finish
