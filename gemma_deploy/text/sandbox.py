"""jinja2 as transformers sets it up for chat templates, with every step and every value counted.

The names, tags and filters are those of `transformers.utils.chat_template_utils` 5.23: a sandbox that changes nothing,
`{% break %}`, `{% generation %}`, `tojson` that writes plain JSON, `strftime_now`, `raise_exception`, and namespaces
without names that begin with an underscore. The limits are ours, see budget.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace, generate_lorem_ipsum
from markupsafe import Markup

from gemma_deploy.text import growth
from gemma_deploy.text.budget import MAX_WEIGHT, current, too_large


class GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: marks what the model says, for training; renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        """A call block around the statements."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatNamespace(Namespace):
    """`namespace(...)`, whose attributes may not begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works, as in jinja2
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        """Without the attributes: namespaces that hold one another would take for ever to print."""
        return "<Namespace>"


class PlainDict:
    """`dict(...)` and `dict.fromkeys(...)`, and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """See `dict`."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """See `dict.fromkeys`."""
        return dict.fromkeys(*args, **kwargs)


class CountedCode(CodeGenerator):
    """Code in which `~` and every list, tuple and dictionary is measured."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        """`a ~ b`: the joined text is measured."""
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            self.write("environment.measured(")
            super().visit_Concat(node, frame)
            self.write(")")
            return
        self.write("environment.concat((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        """`(a, b)`, but not the targets in `for a, b in c`."""
        self._measured(super().visit_Tuple, node, frame, node.ctx == "load")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        """`[a, b]`: the list is measured."""
        self._measured(super().visit_List, node, frame, True)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        """`{a: b}`: the dict is measured."""
        self._measured(super().visit_Dict, node, frame, True)

    def _measured(self, visit: Callable[[Any, Any], None], node: nodes.Node, frame: Any, loaded: bool) -> None:
        self.write("environment.measured(" if loaded else "")
        visit(node, frame)
        self.write(")" if loaded else "")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """An environment for one template or many; rendering in it needs `budget.limited()`."""

    code_generator_class = CountedCode
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.filters["tojson"] = to_json
        self.filters = {name: _counted_filter(name, function) for name, function in self.filters.items()}
        tests: dict[str, Any] = self.tests
        self.tests = {name: _counted_test(function) for name, function in tests.items()}
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": PlainDict(),
            "namespace": ChatNamespace,
        }

    def concat(self, pieces: Iterable[Any]) -> str:
        """Join what a template, a macro or a block has written."""
        return current().joined(pieces)

    def measured(self, value: Any) -> Any:
        """A value that the template has made."""
        current().step()
        return current().measured(value)

    def tick(self) -> str:
        """Count one turn of a loop against the limit."""
        current().step()
        return ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template, with a `tick` at the start of every loop's body."""
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        growth.refuse_operator(operator, left, right)
        return self.measured(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a method or a macro."""
        budget = current()
        budget.step()
        owner = getattr(__obj, "__self__", None)
        if __obj is generate_lorem_ipsum:
            growth.refuse_lorem(args, kwargs)
        elif owner is not None:
            growth.refuse_method(owner, getattr(__obj, "__name__", ""), args, kwargs=kwargs)
        args = tuple(budget.counted(one) for one in args)
        kwargs = {key: budget.counted(one) for key, one in kwargs.items()}
        return budget.measured(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`text.format` and `text.format_map` with formatters that count."""
        if super().wrap_str_format(value) is None:
            return None
        text, of_mapping = value.__self__, value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            if of_mapping:
                (kwargs,), args = args, ()
            kind = _CountedEscapeFormatter if isinstance(text, Markup) else _CountedFormatter
            keywords = {"escape": text.escape} if isinstance(text, Markup) else {}
            return type(text)(kind(self, **keywords).vformat(text, args, kwargs))

        return functools.update_wrapper(formatted, value)


class _Counting:
    """Of a formatter: the sum of all fields is limited."""

    total = 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        """One field."""
        self.total += growth.width(format_spec) + growth.weight(value)
        if self.total > MAX_WEIGHT:
            raise too_large()
        return super().format_field(value, format_spec)  # type: ignore[misc]


class _CountedFormatter(_Counting, SandboxedFormatter):
    pass


class _CountedEscapeFormatter(_Counting, SandboxedEscapeFormatter):
    pass


def raise_exception(message: object) -> None:
    """`raise_exception(...)` of a template."""
    raise jinja2.TemplateError(str(message))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` as plain JSON: jinja2's own escapes <, >, & and ' for HTML."""
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return current().joined(encoder.iterencode(value))


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    given = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment that jinja2 puts in front

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.step()
        values = args[given:]
        growth.refuse_filter(name, values, kwargs)
        kwargs = {key: budget.counted(one) for key, one in kwargs.items()}
        return budget.measured(function(*args[:given], *map(budget.counted, values), **kwargs))

    return counted


def _counted_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        current().step()
        return function(*args, **kwargs)

    return counted


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: the name begins with an underscore")
