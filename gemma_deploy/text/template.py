"""A model's chat template: messages become the text that the model was trained on.

The same words as `apply_chat_template` of transformers gives, in bounded time and memory (sandbox.py, budget.py), and
one error for everything that a template can do wrong. Needs jinja2 alone.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemma_deploy.errors import UsageError

if TYPE_CHECKING:
    import jinja2

DEFAULT, TOOL_USE = "default", "tool_use"
REFUSES = "the chat template refuses the messages: "  # how its errors begin
MAX_SOURCE = 256 << 10  # characters of a template; those of Gemma 4 have 20,000
Message = Mapping[str, Any]
OWN = ("messages", "tools", "documents", "add_generation_prompt")  # names that say what a conversation is
# Names under which a message's reasoning is passed; templates read the first, and gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_NO_TEMPLATE = "use `gemma-deploy run ARTIFACT -p TEXT`, or compile an instruction-tuned checkpoint (-it)"
_REFUSED = "send messages that it takes, or mend it; `gemma-deploy run ARTIFACT -p TEXT` needs no template"


class ChatTemplateError(UsageError):
    """A chat template cannot be used, or refuses the messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of one model.

    Args:
        sources: text by name; a model with one template has `default` alone, and one without has none.
        where: the place they come from, for messages.
        special_tokens: what `bos_token` and the like are in the templates.
    """

    sources: Mapping[str, str]
    where: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sources)

    def source(self, *, tools: bool = False) -> str:
        """The template that is used, as transformers chooses it.

        Args:
            tools: whether the model is told of tools.

        Raises:
            ChatTemplateError: there is none, or several and none of them is `default`.
        """
        if tools and TOOL_USE in self.sources:
            return self.sources[TOOL_USE]
        if DEFAULT in self.sources:
            return self.sources[DEFAULT]
        if not self.sources:
            raise ChatTemplateError(
                "this model has no chat template: it continues text but was not taught to talk",
                where=self.where,
                next_step=_NO_TEMPLATE,
            )
        raise ChatTemplateError(
            f"it has {len(self.sources)} chat templates and none of them is the default one",
            where=self.where,
            problems=sorted(self.sources),
            expected="one template (chat_template.jinja), or one that is named `default`",
            next_step="save the one that is meant as chat_template.jinja",
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text.

        Args:
            messages: {"role": "user" | "assistant" | ..., "content": text or parts}, oldest first; a key whose value
                is None counts as absent.
            add_generation_prompt: whether the text ends where the model is to begin its turn.
            tools: JSON schemas of functions that the model may call.
            documents: {"title": text, "text": text}.
            names: more names for the template (`enable_thinking`), or other values for the special tokens.

        Raises:
            ChatTemplateError: there is no template, it refuses the messages, fails, or takes too much time or memory.
        """
        from gemma_deploy.text import budget

        source = self.source(tools=tools is not None)
        if taken := [name for name in OWN if name in (names or {})]:
            raise ChatTemplateError(
                f"the chat template is given {', '.join(taken)} by what a conversation has",
                where=self.where,
                expected="names of the template's own, such as enable_thinking",
                next_step="leave it out: messages, tools and documents are given as such",
            )
        try:
            with budget.limited() as limits:
                given = plain(
                    {
                        **self.special_tokens,
                        **(names or {}),
                        "messages": [_message(one) for one in messages],
                        "tools": tools,
                        "documents": documents,
                    }
                )
                limits.measured(given)
                return _compiled(source).render(**given, add_generation_prompt=add_generation_prompt)
        except ChatTemplateError as error:
            raise ChatTemplateError(error.what, where=self.where, next_step=error.next_step) from error
        except budget.BudgetError as error:
            raise ChatTemplateError(
                f"{REFUSES}{error}",
                where=self.where,
                expected="a template that writes a conversation once, in a fraction of a second",
                next_step="do not use this template unless you know who made it",
            ) from error
        except Exception as error:  # a template may fail in every way that Python can
            raise ChatTemplateError(f"{REFUSES}{_reason(error)}", where=self.where, next_step=_REFUSED) from error


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    from gemma_deploy.text.sandbox import ChatEnvironment

    if len(source) > MAX_SOURCE:
        raise ChatTemplateError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are read")
    with warnings.catch_warnings():  # of Python about what jinja2 makes of the template: `1[0]`
        warnings.simplefilter("ignore", SyntaxWarning)
        return ChatEnvironment().from_string(source)


def _message(message: Message) -> dict[str, Any]:
    """Without the keys that hold None, and with a model's reasoning under each of its names."""
    if not isinstance(message, Mapping):
        raise TypeError(f"a message is a {type(message).__name__}, expected a role and content")
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in _REASONING if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def plain(value: Any) -> Any:
    """A copy of plain JSON types: templates see no method of anybody else's objects.

    Raises:
        TypeError: it holds something else.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if type(value) is not kind else value
    if isinstance(value, Mapping):
        return {plain(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    raise TypeError(f"a message holds a {type(value).__name__}, expected text, numbers, lists and objects")


def _reason(error: Exception) -> str:
    """What to say of an error of Python's: most say too little without their class."""
    import jinja2

    text = str(error).strip() or "it gives no reason"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    if isinstance(error, jinja2.TemplateError):
        return text
    return f"{type(error).__name__}: {text}"
