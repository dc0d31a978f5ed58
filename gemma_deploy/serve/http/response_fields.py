"""What a body of `/v1/responses` holds, and the same as a conversation of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from gemma_deploy.serve.http.errors import ApiError, wrong
from gemma_deploy.serve.http.fields import MOST_TOKENS, MOST_TOP, ChatFields, Choosing
from gemma_deploy.serve.http.items import messages_of

LOGPROBS = "message.output_text.logprobs"
# Nothing of a request is kept, and nothing goes on when its client has left.
WITHOUT_STORE = {
    "previous_response_id": "no response is stored here: send the whole conversation as input",
    "conversation": "no conversation is stored here: send it as input",
    "prompt": "no prompt is stored here: send its text as instructions",
    "background": "an answer is made while its client waits: leave it out",
}
CHAT_NAMES = {"messages": "input", "response_format": "text", "max_completion_tokens": "max_output_tokens"}
Name = Annotated[str, Field(max_length=512)]


class ResponseFields(Choosing):
    """`/v1/responses`."""

    input: str | list[Any] | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, Name], Field(max_length=16)] | None = None
    stream_options: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def with_logs(self) -> bool:
        """Whether log-probabilities of the text are asked for."""
        return LOGPROBS in (self.include or ())

    def chat(self) -> ChatFields:
        """The same as a conversation.

        Raises:
            ApiError: it asks for what is not built, or an item or a tool is none.
        """
        for name, words in WITHOUT_STORE.items():
            if getattr(self, name):
                raise wrong(name, words, "unsupported")
        if self.truncation == "auto":
            raise wrong("truncation", "disabled: nothing of a conversation is left out here", "unsupported")
        shared = {name: getattr(self, name) for name in Choosing.model_fields}
        return ChatFields(
            **shared,
            messages=messages_of(self.input, self.instructions),
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.with_logs,
            top_logprobs=self.top_logprobs if self.with_logs else None,
            response_format=self._form(),
            tools=[_tool(place, one) for place, one in enumerate(self.tools)] if self.tools else None,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            chat_template_kwargs=self._names(),
        )

    def _form(self) -> dict[str, Any] | None:
        """`text.format` as `response_format`."""
        form = (self.text or {}).get("format")
        if form is None:
            return None
        if not isinstance(form, dict):
            raise wrong("text", "format is an object with a type")
        if form.get("type") != "json_schema":
            return form
        return {"type": "json_schema", "json_schema": form}

    def _names(self) -> dict[str, Any] | None:
        """Names for the chat template; an effort is a switch for these models."""
        effort = (self.reasoning or {}).get("effort")
        if effort is None:
            return self.chat_template_kwargs
        if not isinstance(effort, str):
            raise wrong("reasoning", "effort is a word: none, or how much")
        return {"enable_thinking": effort != "none", **(self.chat_template_kwargs or {})}


def renamed(error: ApiError) -> ApiError:
    """An error about a field of a conversation, as one about the field here that it came from."""
    name = CHAT_NAMES.get(error.param or "")
    if name is None:
        return error
    message = error.message.removeprefix(f"{error.param}: ")
    return ApiError(error.status, f"{name}: {message}", param=name, code=error.code)


def _tool(place: int, given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("type") != "function":
        raise wrong("tools", f"tool {place} has the type {str(given.get('type'))[:40]!r}: function alone, since "
                    "this server runs nothing itself", "unsupported")  # fmt: skip
    function = {key: given[key] for key in ("name", "description", "parameters") if given.get(key) is not None}
    return {"type": "function", "function": function}
