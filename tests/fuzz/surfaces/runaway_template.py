"""Chat templates that are valid and want too much: loops in loops, values that double, filters with large numbers."""

# ruff: noqa: E501 (templates)

from pathlib import Path
from random import Random

from gemma_deploy.text import ChatTemplate, ChatTemplateError
from tests.fuzz.harness import Surface, UnexplainedError
from tests.fuzz.inputs import Inputs

SMALL, LARGE = (
    ("0", "1", "2", "3", "7", "ns.c"),
    ("99", "1000", "65536", "99999", "100000", "10 ** 7", "10 ** 9", "2 ** 63"),
)
WORDS = (
    "ns.a",
    "ns.a",
    "ns.d",
    "messages[0].content",
    "''",
    "'a'",
    "'ab'",
    "' '",
    "'\\n'",
    "'\\t'",
    "'<'",
    "'é'",
    "'a b '",
)
FORMATS = ("'%s'", "'%d'", "'%999999d'", "'%*d'", "'{0}{0}'", "'{:>99999999}'", "'{:{}}'", "'%(a)s'", "'%.999999999f'")
# (what is filtered, filter, kinds of its arguments): t text, n number, l list
TEXT_FILTERS = (
    *("capitalize", "escape", "forceescape", "lower", "safe", "string", "striptags", "title", "upper", "urlencode"),
    *("urlize", "trim", "trim:t", "center:n", "indent:n", "indent:t", "replace:tt", "truncate:n", "wordwrap:n"),
    *("wordwrap:nnt", "format:n", "format:t", "default:t", "first", "last", "random", "reverse"),
)
LIST_FILTERS = (
    "batch:nt",
    "batch:n",
    "slice:n",
    "list",
    "reverse",
    "sort",
    "unique",
    "map:M",
    "select",
    "reject",
    "default:l",
)
TEXT_METHODS = (
    *("capitalize", "casefold", "center:n", "center:nt", "expandtabs:n", "ljust:n", "rjust:nt", "lower", "lstrip:t"),
    *("replace:tt", "strip:t", "rstrip:t", "swapcase", "title", "upper", "zfill:n", "format:tt", "format:nn", "join:l"),
)
LIST_METHODS = ("split", "split:t", "rsplit:tn", "splitlines", "partition:t", "rpartition:t")
NUMBER_METHODS = ("count:t", "find:t", "rfind:t")
MAPPED = (
    "'string'",
    "'upper'",
    "'center', 99999",
    "'replace', '', 'aaaa'",
    "'default', ns.a",
    "'length'",
    "attribute='content'",
)


def text(random: Random, depth: int) -> str:
    """An expression of text."""
    if depth <= 0:
        return random.choice(WORDS)
    inner = depth - random.randint(1, 2)
    match random.randrange(12):
        case 0 | 1:
            return f"({text(random, inner)} {random.choice('+~')} {text(random, inner)})"
        case 2:
            return f"({text(random, inner)} * {number(random, inner)})"
        case 3 | 4 | 5:
            return f"({applied(text(random, inner), TEXT_FILTERS, ' | ', random, inner)})"
        case 6 | 7:
            return applied(f"({text(random, inner)})", TEXT_METHODS, ".", random, inner)
        case 8:
            return f"({sequence(random, inner)} | join({random.choice(('', text(random, inner)))}))"
        case 9:
            form = random.choice(FORMATS)
            given = f"{random.choice((text, number))(random, inner)}"
            return random.choice(
                (f"({form} % {given})", f"({form} % ({given}, {given}))", f"{form}.format({given}, {given})")
            )
        case 10:
            value = random.choice((text, number, sequence))(random, inner)
            return f"({value} | {random.choice(('tojson', 'pprint', 'string', 'tojson(indent=9)', 'tojson(indent=99999)'))})"
    return f"m({text(random, inner)})"


def number(random: Random, depth: int) -> str:
    """An expression of a number, large ones among them."""
    if depth <= 0:
        return random.choice(random.choice((SMALL, SMALL, LARGE)))
    inner = depth - 1
    match random.randrange(5):
        case 0 | 1:
            return (
                f"({number(random, inner)} {random.choice(('+', '-', '*', '**', '//', '%'))} {number(random, inner)})"
            )
        case 2:
            return (
                f"({random.choice((text, sequence))(random, inner)} | {random.choice(('length', 'count', 'int(7)'))})"
            )
        case 3:
            return applied(f"({text(random, inner)})", NUMBER_METHODS, ".", random, inner)
    return f"({sequence(random, inner)} | sum)"


def sequence(random: Random, depth: int) -> str:
    """An expression of a list."""
    if depth <= 0:
        return random.choice(("ns.b", "ns.b", "messages", "[1, 'a']", "range(9)", "range(99999)", "[]"))
    inner = depth - random.randint(1, 2)
    match random.randrange(8):
        case 0:
            return f"[{random.choice((text, number, sequence))(random, inner)}, {sequence(random, inner)}]"
        case 1:
            return f"({sequence(random, inner)} | list + {sequence(random, inner)} | list)"
        case 2:
            return f"([{text(random, inner)}] * {number(random, inner)})"
        case 3 | 4:
            return f"({applied(sequence(random, inner), LIST_FILTERS, ' | ', random, inner)} | list)"
        case 5:
            return applied(f"({text(random, inner)})", LIST_METHODS, ".", random, inner)
        case 6:
            return f"({text(random, inner)} | list)"
    return f"({sequence(random, inner)})[{random.choice((':9', '::2', ':' + number(random, inner)))}]"


def applied(value: str, kinds: tuple[str, ...], sign: str, random: Random, depth: int) -> str:
    """A filter or a method with its arguments."""
    name, _, given = random.choice(kinds).partition(":")
    makers = {"t": text, "n": number, "l": sequence}
    made = [random.choice(MAPPED) if one == "M" else makers[one](random, depth - 1) for one in given]
    call = f"({', '.join(made)})" if made or sign == "." else ""
    return f"{value}{sign}{name}{call}"


def statements(random: Random, depth: int) -> str:
    """A few, loops and blocks among them."""
    made = ""
    for _ in range(random.randint(1, 3)):
        inner = statements(random, depth - 1) if depth else "x"
        deep = random.randint(1, 3)
        match random.randrange(10):
            case 0 | 1:
                made += f"{{% set ns.{random.choice('ad')} = {text(random, deep)} %}}"
            case 2:
                made += f"{{% set ns.b = {sequence(random, deep)} %}}"
            case 3:
                made += f"{{% set ns.c = {number(random, deep)} %}}"
            case 4:
                made += random.choice(
                    ("{% set ns.a = ns.a ~ ns.a %}", "{% set ns.b = [ns.b, ns.b] %}", "{% set ns.c = ns.c * ns.c %}")
                )
            case 5 | 6:
                made += f"{{% for i in {sequence(random, deep)} {random.choice(('', 'if i', 'recursive'))} %}}{inner}{{% endfor %}}"
            case 7:
                made += f"{{% set ns.a %}}{inner}{{{{ ns.a }}}}{{{{ ns.a }}}}{{% endset %}}"
            case 8:
                made += f"{{{{ {random.choice((text, number, sequence))(random, deep)} }}}}"
            case 9:
                made += f"{{% filter {applied('', TEXT_FILTERS, '', random, 1)} %}}{inner}{{% endfilter %}}"
    return made


def prepare(inputs: Inputs, folder: Path) -> list[dict[str, str]]:
    return [{"role": "user", "content": "the list of words"}, {"role": "assistant", "content": "a b c"}]


def attempt(messages: list[dict[str, str]], random: Random) -> None:
    source = "{% set ns = namespace(a='ab', b=[1, 'c'], c=7, d='e') %}{% macro m(x=1) %}{{ x }}{{ x }}{% endmacro %}"
    source += statements(random, random.randint(1, 3))
    try:
        ChatTemplate({"default": source}, "a model").render(messages, add_generation_prompt=True)
    except ChatTemplateError as error:
        if not error.what.startswith("the chat template refuses the messages: "):
            raise UnexplainedError(error.what) from error


SURFACE = Surface("runaway_template", prepare, attempt)
