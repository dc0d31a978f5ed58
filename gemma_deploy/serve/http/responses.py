"""`/v1/responses`: conversations are answered with items, and streams with events that have names."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from gemma_deploy.chat import Text
from gemma_deploy.serve.http.chats import Chat
from gemma_deploy.serve.http.errors import ApiError
from gemma_deploy.serve.http.output import Output
from gemma_deploy.serve.http.response_fields import ResponseFields
from gemma_deploy.serve.http.served import Asked
from gemma_deploy.serve.http.speech import Speech

ECHOED = (
    "instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "metadata", "user",
    "prompt_cache_key", "safety_identifier",
)  # fmt: skip
CUT = {"reason": "max_output_tokens"}


class ModelResponse:
    """One request, and its answer; see `Completion`.

    Args:
        chat: the same as a conversation, which is being answered; name: of the model, as it was asked for.
    """

    def __init__(self, chat: Chat, fields: ResponseFields, name: str) -> None:
        self.id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._chat, self._fields, self._name = chat, fields, name
        self._output, self._thought = Output(), 0

    @property
    def asked(self) -> Sequence[Asked]:
        """See `Completion`."""
        return self._chat.asked

    @property
    def speeches(self) -> Sequence[Speech]:
        """See `Completion`."""
        return self._chat.speeches

    @property
    def prompt_tokens(self) -> int:
        """See `Completion`."""
        return self._chat.prompt_tokens

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        async for _ in self._said():
            pass
        return self._ended()

    async def chunks(self) -> AsyncIterator[Mapping[str, Any]]:
        """The answer as events; what fails is one of them."""
        number = 0
        async for body in self._events():
            yield {**body, "sequence_number": number}
            number += 1

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        yield {"type": "response.created", "response": self._body("in_progress")}
        yield {"type": "response.in_progress", "response": self._body("in_progress")}
        try:
            async for body in self._said():
                yield body
        except ApiError as error:
            code = "rate_limit_exceeded" if error.status == 429 else "server_error"
            failed = self._body("failed", error={"code": code, "message": error.message})
            yield {"type": "response.failed", "response": failed}
            return
        ended = self._ended()
        yield {"type": f"response.{ended['status']}", "response": ended}

    async def _said(self) -> AsyncIterator[dict[str, Any]]:
        logs: list[Any] = []
        (speech,) = self.speeches
        async for heard in self._chat.heard(speech):
            self._thought += heard.thought and heard.piece.token is not None
            logs += [] if heard.thought else heard.logs
            for event in heard.events:
                for body in self._output.add(event, logs if isinstance(event, Text) else []):
                    yield body
                logs = []
        for body in self._output.end("incomplete" if self._is_cut else "completed"):
            yield body

    @property
    def _is_cut(self) -> bool:
        return self.speeches[0].finish == "length"

    def _ended(self) -> dict[str, Any]:
        usage = self._chat.usage()
        usage = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._thought},
            "total_tokens": usage["total_tokens"],
        }
        if self._is_cut:
            return self._body("incomplete", usage=usage, incomplete_details=CUT)
        return self._body("completed", usage=usage, completed_at=int(time.time()))

    def _body(self, status: str, **more: Any) -> dict[str, Any]:
        fields = self._fields
        given = {name: getattr(fields, name, None) for name in ECHOED}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._name,
            "output": list(self._output.items),
            "error": None,
            "incomplete_details": None,
            "usage": None,
            **given,
            "metadata": fields.metadata or {},
            "background": False,
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "reasoning": {"effort": (fields.reasoning or {}).get("effort"), "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if fields.temperature is None else fields.temperature,
            "text": {"format": {"type": "text"}, **(fields.text or {})},
            "tool_choice": fields.tool_choice or "auto",
            "tools": fields.tools or [],
            "top_logprobs": fields.top_logprobs or 0,
            "top_p": 1.0 if fields.top_p is None else fields.top_p,
            "truncation": "disabled",
            **more,
        }
