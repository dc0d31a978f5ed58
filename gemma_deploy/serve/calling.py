"""A grammar that nothing but calls of given functions follow, as a family of models writes them: `call_grammar`.

    <|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>

Of a function's JSON schema the grammar holds names, their order, what is required, types, `enum`, `const`, `items`,
`minItems`, `maxItems`, `anyOf`, `oneOf`, `allOf`, `$ref` within it, `additionalProperties` of objects without
properties, bounds of numbers and lengths of texts; not `pattern`, `format` and what else there is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_deploy.chat import ChatFormat
from gemma_deploy.errors import UsageError
from gemma_deploy.serve.guiding import JSON_OPTIONS, Grammar

DEEPEST = 32  # schemas inside each other; a call may have twice as many objects and lists
MOST_LENGTH = 10_000  # items of a list and characters of a text that are counted
NAME = re.compile(r"[\w.:/-]+")
KEY = re.compile(r"[\w.$-]+")
INTEGER, FRACTION = r"/-?(0|[1-9][0-9]{0,17})/", r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][-+]?[0-9]{1,2})?/"
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
TOGETHER = {"$ref", "anyOf", "oneOf", "allOf"}
KINDS = ("string", "integer", "number", "boolean", "null", "array", "object")
WRONG = "mend the schema of the function, or leave tool_choice to auto"
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Function:
    """What may be called.

    Args:
        parameters: JSON schema of its arguments, an object; None: it takes none.
    """

    name: str
    parameters: Schema | None = None


def call_grammar(
    functions: Sequence[Function],
    form: ChatFormat,
    tokens: Mapping[int, str],
    *,
    several: bool,
    thinking: str = "",
    otherwise: Schema | None = None,
) -> Grammar:
    """The grammar.

    Args:
        functions: one at least; tokens: the markers of the form, by their ids; several: more than one call may follow.
        thinking: "" where none comes before the calls, "may" where it may, "began" where the prompt begins it.
        otherwise: JSON schema of what may be said in the place of calls.

    Raises:
        UsageError: the form has no calls, or a function cannot be called in it.
    """
    ids = {text: f"<[{token}]>" for token, text in tokens.items()}
    missing = [marker for marker in form.markers if marker not in ids]
    if form.call is None or missing:
        raise UsageError(
            f"this model has no token {missing[0]}" if missing else "this model has no form of its own for tool calls",
            expected="a model whose chat template shows one: Gemma 4, FunctionGemma",
            next_step="send auto or none, and describe the form in the prompt",
        )
    rules = _Rules(ids[form.call.quote], _without([form.call.quote]))
    calls = []
    for function in functions:
        if not NAME.fullmatch(function.name):
            raise UsageError(
                f"no call can have the name {function.name[:80]!r}", expected="letters, digits and _ . : / -",
                next_step="give the function another name",
            )  # fmt: skip
        rules.root = function.parameters or {}
        calls.append(f"{_literal(f'call:{function.name}')} {rules.arguments()}")
    rules.add("call", f"{ids[form.call.begin]} ( {' | '.join(calls)} ) {ids[form.call.end]}")
    start = "call+" if several else "call"
    if otherwise is not None:
        rules.add("answer", f"%json {json.dumps({'x-guidance': JSON_OPTIONS, **otherwise})}")
        start = f"( {start} | answer )"
    if thinking and form.channel is not None:
        channel = form.channel
        rules.add("THOUGHT", _without([channel.begin, channel.end, form.call.begin]))
        head = f"{ids[channel.begin]} {_literal(channel.name + chr(10))} " if thinking == "may" else ""
        rules.add("thinking", f"{head}THOUGHT? {ids[channel.end]}")
        start = f"thinking{'?' if thinking == 'may' else ''} {start}"
    return Grammar("grammar", "\n".join([f"start: {start}", *rules.lines]))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _without(markers: Iterable[str]) -> str:
    """A terminal: text that spells none of some markers."""
    some = "|".join(map(re.escape, markers)).replace("/", r"\/")
    return f"/(?s:.)+/ & ~/(?s:.*)({some})(?s:.*)/"


class _Rules:
    """Rules so far.

    Args:
        quote: before and after a text; text: a terminal of what stands between.
    """

    def __init__(self, quote: str, text: str) -> None:
        self.root: Schema = {}  # that $ref begins at
        self.lines: list[str] = []
        self._quote, self._count = quote, 0
        self._referred: dict[tuple[int, str], str] = {}
        self.add("none", '""')
        self.add("TEXT", text)
        self.add("text", f"{quote} TEXT? {quote}")
        self.add("key", f"/{KEY.pattern}/ | text")
        self.add("any", f'text | {FRACTION} | "true" | "false" | "null" | list | map')
        self.add("list", '"[" ( any ( "," any )* )? "]"')
        self.add("map", self._map("any"))

    def add(self, name: str, body: str) -> None:
        """One more."""
        self.lines.append(f"{name}: {body}")

    def _named(self, body: str, capital: bool = False) -> str:
        """One more, of a name that it gets."""
        self._count += 1
        name = f"{'R' if capital else 'r'}{self._count}"
        self.add(name, body)
        return name

    def arguments(self) -> str:
        """What the arguments of a function follow, whose schema `root` is; see `value`."""
        return self.value(self.root, 0) if TOGETHER & self.root.keys() else self.object(self.root, 0)

    def value(self, schema: Any, depth: int) -> str:
        """What a value follows.

        Raises:
            UsageError: it is no schema, or refers to nothing.
        """
        if schema is True:
            return "any"
        if not isinstance(schema, Mapping) or depth > DEEPEST:
            raise UsageError(
                "the schema of a function is no object, or too deep", expected=f"at most {DEEPEST} inside each other",
                next_step=WRONG,
            )  # fmt: skip
        if isinstance(schema.get("$ref"), str):
            return self._reference(schema["$ref"], depth)
        if "const" in schema or isinstance(schema.get("enum"), list):
            return self._choice(self._written(one) for one in schema.get("enum", [schema.get("const")]))
        for several in ("anyOf", "oneOf"):
            if isinstance(schema.get(several), list):
                return self._choice(self.value(one, depth + 1) for one in schema[several])
        if isinstance(schema.get("allOf"), list):
            return self.value(_together(schema), depth + 1)
        kind = schema.get("type")
        if isinstance(kind, list):
            return self._choice(self.value({**schema, "type": one}, depth + 1) for one in kind)
        if kind is None:
            kind = "object" if "properties" in schema else "array" if "items" in schema else None
        if kind is None:
            return "any"
        if kind not in KINDS:
            raise UsageError(
                f"the schema of a function has the type {str(kind)[:40]!r}", expected=", ".join(KINDS), next_step=WRONG
            )
        if kind == "object":
            free = "properties" not in schema and schema.get("additionalProperties", True) is not False
            return self._free(schema, depth) if free else self.object(schema, depth)
        if kind == "array":
            return self._list(schema, depth)
        if kind == "string":
            return self._text(schema)
        if kind in ("integer", "number"):
            return self._number(schema, kind)
        return '( "true" | "false" )' if kind == "boolean" else '"null"'

    def object(self, schema: Schema, depth: int) -> str:
        """Properties in their order, those that are not required or not; others are not taken."""
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise UsageError("properties is no object, or required no list", next_step=WRONG)
        every = {str(key): value for key, value in properties.items()}
        every |= {str(key): True for key in required if str(key) not in every}
        # From behind: what may follow where a property was there already (`more`), and where none was.
        first = more = "none"
        for key, of in reversed(every.items()):
            shown = _literal(f"{key}:") if KEY.fullmatch(key) else f'{self._quoted(key)} ":"'
            pair = self._named(f"{shown} {self.value(of, depth + 1)}")
            alone, behind = f"{pair} {more}", f'"," {pair} {more}'
            if key not in required:
                alone, behind = f"{alone} | {first}", f"{behind} | {more}"
            first, more = self._named(alone), self._named(behind)
        return self._named(f'"{{" {first} "}}"')

    def _free(self, schema: Schema, depth: int) -> str:
        given = schema.get("additionalProperties", True)
        return "map" if given is True else self._named(self._map(self.value(given, depth + 1)))

    @staticmethod
    def _map(value: str) -> str:
        return f'"{{" ( key ":" {value} ( "," key ":" {value} )* )? "}}"'

    def _list(self, schema: Schema, depth: int) -> str:
        item = self.value(schema.get("items", True), depth + 1)
        least, most = _length(schema, "minItems") or 0, _length(schema, "maxItems")
        if most == 0:
            return '"[" "]"'
        more = f'( "," {item} ){{{max(least - 1, 0)},{"" if most is None else max(most, least) - 1}}}'
        return self._named(f'"[" ( {item} {more} ){"" if least else "?"} "]"')

    def _text(self, schema: Schema) -> str:
        least, most = _length(schema, "minLength") or 0, _length(schema, "maxLength")
        if not least and most is None:
            return "text"
        limit = f"/(?s:.){{{max(least, 1)},{'' if most is None else max(most, least, 1)}}}/"
        terminal = self._named(f"{limit} & TEXT", capital=True)
        return f"{self._quote} {'' if most == 0 else terminal + ('' if least else '?')} {self._quote}"

    def _number(self, schema: Schema, kind: str) -> str:
        bounds = {name: schema[name] for name in BOUNDS if type(schema.get(name)) in (int, float)}
        if bounds:
            return self._named(f"%json {json.dumps({'type': kind, **bounds})}")
        return INTEGER if kind == "integer" else FRACTION

    def _choice(self, several: Iterable[str]) -> str:
        found = list(several)
        if not found:
            raise UsageError("the schema of a function leaves a value no choice", next_step=WRONG)
        return self._named(" | ".join(found))

    def _written(self, value: Any) -> str:
        """A value that is known, as the form writes it."""
        if isinstance(value, str):
            return self._quoted(value)
        if isinstance(value, Mapping):
            pairs = ' "," '.join(f'{self._quoted(str(key))} ":" {self._written(one)}' for key, one in value.items())
            return f'"{{" {pairs} "}}"'
        if isinstance(value, list):
            items = ' "," '.join(map(self._written, value))
            return f'"[" {items} "]"'
        return _literal(json.dumps(value))

    def _quoted(self, text: str) -> str:
        return f"{self._quote} {_literal(text)} {self._quote}"

    def _reference(self, given: str, depth: int) -> str:
        key = (id(self.root), given)
        if key not in self._referred:
            found: Any = self.root
            for step in given.removeprefix("#").split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                found = found.get(step) if isinstance(found, Mapping) else None
            if not given.startswith("#") or found is None:
                raise UsageError(f"the schema of a function refers to {given[:80]!r}", next_step=WRONG)
            self._count += 1
            name = self._referred[key] = f"r{self._count}"
            self.add(name, self.value(found, depth + 1))
        return self._referred[key]


def _together(schema: Schema) -> dict[str, Any]:
    """`allOf` and what stands beside it as one: properties of all, required of any."""
    found: dict[str, Any] = {}
    for one in (*schema["allOf"], {key: value for key, value in schema.items() if key != "allOf"}):
        if not isinstance(one, Mapping):
            raise UsageError("allOf holds what is no schema", next_step=WRONG)
        for key, value in one.items():
            old = found.get(key)
            if isinstance(old, Mapping) and isinstance(value, Mapping):
                found[key] = {**old, **value}
            elif isinstance(old, list) and isinstance(value, list):
                found[key] = [*old, *value]
            else:
                found[key] = value
    return found


def _length(schema: Schema, name: str) -> int | None:
    value = schema.get(name)
    return value if type(value) is int and 0 <= value <= MOST_LENGTH else None
