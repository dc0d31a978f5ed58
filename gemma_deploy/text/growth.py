"""What an operator, a method or a filter of a template would make, asked before it is made.

Python computes `'x' * 10**9`, `10 ** 10**9` or `'%999999999d' % 1` in one go and cannot be stopped, so the size is
worked out from the arguments first. Only what grows is listed here; all other results are measured afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_deploy.text.budget import MAX_BITS, MAX_ITEMS, MAX_WEIGHT, BudgetError, too_large, too_long, weight

SEARCHES = 1 << 30  # comparisons of characters in one search from the right, which takes length times length
SHORT = 1000  # characters of a set to strip or of a separator, digits to round to
SMALL = 20_000  # characters for filters that take the square of them (striptags, urlize, pprint)
TEXT_ENCODINGS = frozenset(("utf-8", "utf8", "utf-16", "utf-32", "ascii", "latin-1", "iso-8859-1"))
_NUMBERS = re.compile(r"[0-9]+")


def refuse_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse a product, a power or a formatted text that is too large.

    Raises:
        BudgetError: it is.
    """
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            _at_most(left.bit_length() + right.bit_length(), MAX_BITS)
        elif isinstance(left, (str, bytes, list, tuple)) and isinstance(right, int):
            _refuse_repeat(left, right)
        elif isinstance(right, (str, bytes, list, tuple)) and isinstance(left, int):
            _refuse_repeat(right, left)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _at_most(left.bit_length() * max(right, 0), MAX_BITS)
    elif operator == "%" and isinstance(left, bytes):
        raise BudgetError("it formats bytes")
    elif operator == "%" and isinstance(left, str):
        refuse_format(left, right)


def refuse_format(pattern: str, values: Any) -> None:
    """Refuse a format whose fields are too wide or whose values are put in too often.

    Raises:
        BudgetError: they are.
    """
    fields = pattern.count("%")
    largest = weight(values)
    if "*" in pattern and fields:
        numbers = values if isinstance(values, tuple) else (values,)
        largest = max([largest, *(abs(one) for one in numbers if isinstance(one, int))])
    _at_most(width(pattern) + len(pattern) + fields * largest * 4, 8 * MAX_WEIGHT)


def width(pattern: str) -> int:
    """Sum of all numbers in a format: the spaces and digits it can ask for."""
    found = _NUMBERS.findall(pattern)
    if any(len(digits) > 9 for digits in found):
        raise too_large()
    return sum(map(int, found))


def refuse_method(owner: Any, name: str, args: Sequence[Any], *, kwargs: Mapping[str, Any]) -> None:
    """Refuse a method of a text, bytes or a number that would make, or take, too much.

    Args:
        owner: what it is a method of.
        name: of the method.
        args, kwargs: what it is called with.

    Raises:
        BudgetError: it would.
    """
    values = [*args, *kwargs.values()]
    if isinstance(owner, int):
        if name in ("to_bytes", "from_bytes"):
            _at_most(max([_size(one) for one in values], default=0), SHORT)
        return
    if not isinstance(owner, (str, bytes)):
        return
    largest = max([one for one in values if isinstance(one, int)], default=0)
    longest = max([len(one) for one in values if isinstance(one, (str, bytes))], default=0)
    if name in ("center", "ljust", "rjust", "zfill"):
        _at_most(largest, MAX_WEIGHT)
    elif name == "expandtabs":
        _at_most(len(owner) * max(largest, 8), MAX_WEIGHT)
    elif name == "replace" and len(args) >= 2:
        refuse_replace(owner, args[0], args[1])
    elif name == "join" and args:
        refuse_join(owner, args[0])
    elif name == "translate" and args and isinstance(args[0], Mapping):
        _at_most(len(owner) * max([_size(one) for one in args[0].values()], default=1), MAX_WEIGHT)
    elif name in ("strip", "lstrip", "rstrip"):
        _at_most(longest, SHORT)
    elif name in ("rfind", "rindex", "rsplit", "rpartition"):
        _at_most(len(owner) * longest, SEARCHES)
    elif name in ("encode", "decode"):
        names = [one.lower() for one in values[:1] if isinstance(one, str)]
        if not TEXT_ENCODINGS.issuperset(names):
            raise BudgetError(f"it uses the encoding {names[0][:40]!r}")
    elif name in ("striptags", "unescape"):
        _at_most(len(owner), SMALL)


def refuse_replace(text: Any, old: Any, new: Any) -> None:
    """Refuse to replace short pieces by long ones too often.

    Raises:
        BudgetError: the text becomes too large.
    """
    if isinstance(text, (str, bytes)) and type(old) is type(text) and isinstance(new, type(text)):
        grows = len(new) - len(old)
        if grows > 0:
            _at_most(len(text) + grows * text.count(old), MAX_WEIGHT)  # type: ignore[arg-type]
    elif any(isinstance(one, str) for one in (text, old, new)):
        _at_most(max(weight(text), 1) * max(weight(new), 1), MAX_WEIGHT)


def refuse_join(separator: Any, values: Any) -> None:
    """Refuse to join many values by a long separator.

    Raises:
        BudgetError: the text becomes too large.
    """
    if hasattr(values, "__len__"):
        _at_most(len(values) * _size(separator), MAX_WEIGHT)
    else:
        _at_most(_size(separator), SHORT)


def refuse_lorem(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse more than `SHORT` paragraphs or words of `lipsum()`.

    Raises:
        BudgetError: that is asked for.
    """
    _at_most(max([_size(one) for one in (*args, *kwargs.values())], default=0), SHORT)


def refuse_filter(name: str, values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a filter of jinja2 that would make, or take, too much.

    Args:
        name: of the filter.
        values: what it is applied to, and its arguments.
        kwargs: further arguments.

    Raises:
        BudgetError: it would.
    """
    check = _FILTERS.get(name)
    if check is not None:
        check(values, kwargs)


def _few_characters(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _at_most(weight([*values, *kwargs.values()]), SMALL)


def _short_numbers(most: int) -> Callable[[Sequence[Any], Mapping[str, Any]], None]:
    def check(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        _at_most(max([abs(one) for one in (*values[1:], *kwargs.values()) if isinstance(one, int)], default=0), most)

    return check


def _elements(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if values and isinstance(values[0], (str, bytes)) and len(values[0]) > MAX_ITEMS:
        raise too_long()


def _indented(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    text, *others = values
    indent = max([_size(one) for one in (*others, *kwargs.values())], default=4)
    lines = text.count("\n") + 1 if isinstance(text, str) else 1
    _at_most(lines * indent, MAX_WEIGHT)


def _formatted(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    refuse_format(str(values[0]), kwargs if kwargs else tuple(values[1:]))


def _replaced(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    old, new = kwargs.get("old", ""), kwargs.get("new", "")
    text, *given = values
    refuse_replace(text, given[0] if given else old, given[1] if len(given) > 1 else new)


def _joined(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    refuse_join(values[1] if len(values) > 1 else kwargs.get("d", ""), values[0])


def _summed(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    start = values[2] if len(values) > 2 else kwargs.get("start", 0)
    if not isinstance(start, (int, float)):
        raise BudgetError("it sums what are no numbers")


def _stripped(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _at_most(max([_size(one) for one in (*values[1:], *kwargs.values())], default=0), SHORT)


def _written(values: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Arguments of tojson: ensure_ascii, indent, separators, sort_keys."""
    layout = [*values[1:], *kwargs.values()]
    flat = [one for each in layout for one in (each if isinstance(each, (list, tuple)) else (each,))]
    _at_most(max([_size(one) for one in flat], default=0), 16)


_FILTERS: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], None]] = {
    **dict.fromkeys(("striptags", "urlize", "pprint", "xmlattr", "wordwrap"), _few_characters),
    **dict.fromkeys(("batch", "slice"), _short_numbers(MAX_ITEMS)),
    **dict.fromkeys(("center", "truncate"), _short_numbers(MAX_WEIGHT)),
    "round": _short_numbers(SHORT),
    **dict.fromkeys(("list", "sort", "map", "select", "reject", "unique", "groupby", "min", "max"), _elements),
    "indent": _indented,
    "format": _formatted,
    "replace": _replaced,
    "join": _joined,
    "sum": _summed,
    "trim": _stripped,
    "tojson": _written,
}


def _refuse_repeat(value: Any, times: int) -> None:
    is_text = isinstance(value, (str, bytes))
    _at_most((len(value) if is_text else weight(value)) * max(times, 0), MAX_WEIGHT)
    if not is_text and len(value) * times > MAX_ITEMS:
        raise too_long()


def _size(value: Any) -> int:
    """How much an argument can ask for: a number itself, a text its length."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, (str, bytes)) else 1


def _at_most(found: int, most: int) -> None:
    if found > most:
        raise too_large()
