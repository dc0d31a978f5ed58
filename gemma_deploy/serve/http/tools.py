"""`tools` and `tool_choice`: what the model is told of, and what it has to call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_deploy.chat import ChatFormat
from gemma_deploy.errors import UsageError
from gemma_deploy.serve.calling import Function, call_grammar
from gemma_deploy.serve.guiding import Grammar
from gemma_deploy.serve.http.errors import told, wrong
from gemma_deploy.serve.http.fields import ChatFields

MOST_TOOLS = 256
CHOICE = "tool_choice"
FORMS = 'none, auto, required, {"type": "function", "function": {"name": NAME}}, or allowed_tools'


@dataclass(frozen=True)
class ToolUse:
    """What there is to call.

    Args:
        shown: functions that the model is told of; forced: those one of which it has to call, None: it may say text.
        several: whether it may make more than one call.
    """

    shown: list[dict[str, Any]] | None = None
    forced: tuple[Function, ...] | None = None
    several: bool = True

    def grammar(
        self, form: ChatFormat, tokens: Mapping[int, str], *, thinking: str, schema: Mapping[str, Any] | None = None
    ) -> Grammar | None:
        """What the answer has to follow because of functions; the arguments as `call_grammar`.

        Args:
            schema: what text has to follow, where the model is free to call or to say it.

        Raises:
            ApiError: the model has no form of calls, or a function cannot be called in it.
        """
        functions, otherwise = self.forced, None
        if functions is None and schema is not None and self.shown and form.call is not None:
            functions, otherwise = _named(self.shown, None), schema
        if functions is None:
            return None
        try:
            return call_grammar(functions, form, tokens, several=self.several, thinking=thinking, otherwise=otherwise)
        except UsageError as error:
            raise told(error, CHOICE) from None


def tool_use(fields: ChatFields) -> ToolUse:
    """What a request says of it.

    Raises:
        ApiError: there is no such choice, or no such function.
    """
    choice, tools = fields.tool_choice, fields.tools or []
    if len(tools) > MOST_TOOLS:
        raise wrong("tools", f"at most {MOST_TOOLS}")
    several = fields.parallel_tool_calls is not False
    if choice in (None, "auto", "none"):
        return ToolUse(None if choice == "none" else tools or None, None, several)
    if choice == "required":
        return ToolUse(tools, _named(tools, None), several)
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function" and isinstance(choice, dict):
        return ToolUse(tools, _named(tools, [choice]), several=False)
    allowed = choice.get(kind, choice) if kind == "allowed_tools" and isinstance(choice, dict) else None
    if isinstance(allowed, dict) and isinstance(allowed.get("tools"), list):
        functions = _named(tools, allowed["tools"])
        names = {one.name for one in functions}
        shown = [one for one in tools if _function(one).get("name") in names]
        return ToolUse(shown, functions if allowed.get("mode") == "required" else None, several)
    raise wrong(CHOICE, f"one of {FORMS}")


def _named(tools: list[dict[str, Any]], chosen: list[Any] | None) -> tuple[Function, ...]:
    """The functions that are called so; None: all."""
    known: dict[str, Function] = {}
    for place, tool in enumerate(tools):
        function = _function(tool)
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not isinstance(parameters, Mapping | None):
            raise wrong("tools", f"tool {place} is no function with a name and an object of parameters")
        known[name] = Function(name, parameters)
    if not known:
        raise wrong(CHOICE, "a call is asked for, and tools names no function")
    if chosen is None:
        return tuple(known.values())
    names = [_function(one).get("name") for one in chosen if isinstance(one, dict)]
    found = [known.get(str(name)) for name in names]
    if not found or None in found:
        raise wrong(CHOICE, f"no tool is called {str(names[found.index(None)] if found else None)[:80]!r}")
    return tuple(one for one in found if one is not None)


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """What stands under `function`, as chat completions have it, or the tool itself."""
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}
