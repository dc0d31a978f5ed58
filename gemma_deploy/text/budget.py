"""Limits for one rendering of a chat template: steps, seconds, and the size of every value it makes.

A template comes with a checkpoint from anywhere. Loops in loops, strings that double, and lists that hold each other
twice are all valid templates that never end or take the machine's memory; a single operator may do it (`10 ** 10 ** 9`
holds Python's lock until it is done). So operators and functions are asked beforehand what they would make, see
`growth`, and every value is measured when it is made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

MAX_WEIGHT = 2 << 20  # characters of one value, what it holds counted as often as it would be printed
MAX_ITEMS = 100_000  # elements of one list; jinja2 allows range() as many
MAX_ELEMENTS = 250_000  # of a list and of the lists in it, counted in the same way
MAX_STEPS = 500_000  # turns of loops, calls, operators and filters; 1,000 messages take 4,000 to 11,000
MAX_SECONDS = 3.0  # of this thread's processor time
MAX_BYTES = 256 << 20  # of all values together, those given up included
MAX_BITS = 100_000  # of a whole number
_STEPS_PER_LOOK = 32  # at the clock


class BudgetError(Exception):
    """A template asks for more than one rendering may take; its text says of what."""


class Budget:
    """What one rendering has used up so far."""

    def __init__(self) -> None:
        self._steps = self._bytes = 0
        self._ends = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        """Count one step.

        Raises:
            BudgetError: there were too many, or they took too long.
        """
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise BudgetError(f"it takes more than {MAX_STEPS:,} steps")
        if self._steps % _STEPS_PER_LOOK == 0:
            self.look()

    def look(self) -> None:
        """Look at the clock.

        Raises:
            BudgetError: the time is up.
        """
        if time.thread_time() > self._ends:
            raise BudgetError(f"it takes more than {MAX_SECONDS:g} seconds")

    def measured(self, value: Any) -> Any:
        """The value, if it is not too large.

        Raises:
            BudgetError: it is, or with it there were too many bytes.
        """
        if type(value) is str:
            if len(value) > MAX_WEIGHT:
                raise too_large()
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise BudgetError(f"it makes a number of more than {MAX_BITS:,} bits")
            return value
        elif weight(value) > MAX_WEIGHT:
            raise too_large()
        size = sys.getsizeof(value, 0)
        if size > 1024:
            self._bytes += size
            if self._bytes > MAX_BYTES:
                raise BudgetError(f"it makes more than {MAX_BYTES >> 20} MiB of text and lists")
            self.look()
        return value

    def joined(self, pieces: Iterable[Any]) -> str:
        """The text of all pieces.

        Raises:
            BudgetError: it is too large.
        """
        kept, total = [], 0
        for piece in pieces:
            text = piece if isinstance(piece, str) else str(piece)
            total += len(text)
            if total > MAX_WEIGHT:
                raise too_large()
            kept.append(text)
        self.step()
        return str(self.measured("".join(kept)))

    def counted(self, value: Any) -> Any:
        """A generator whose elements are counted when they are asked for; any other value as it is."""
        return self._count(value) if isinstance(value, GeneratorType) else value

    def _count(self, values: Iterator[Any]) -> Iterator[Any]:
        total = 0
        for value in values:
            total += len(value) if isinstance(value, (str, bytes)) else 1
            if total > MAX_WEIGHT:
                raise too_large()
            self.step()
            yield value


_CURRENT: ContextVar[Budget | None] = ContextVar("budget of this rendering", default=None)


@contextmanager
def limited() -> Iterator[Budget]:
    """A fresh budget for what is rendered within."""
    budget = Budget()
    before = _CURRENT.set(budget)
    try:
        yield budget
    finally:
        _CURRENT.reset(before)


def current() -> Budget:
    """The budget of this rendering."""
    budget = _CURRENT.get()
    assert budget is not None, "templates are rendered under limited() alone"
    return budget


def weight(value: Any) -> int:
    """Characters and elements that a value would have if it were written out; stops counting above `MAX_WEIGHT`.

    Lists that hold one list twice are counted twice: printing and comparing them takes as long.

    Raises:
        BudgetError: a list holds more than `MAX_ITEMS`, or lists in lists more than `MAX_ELEMENTS`.
    """
    total, elements, left = 0, 0, [value]
    while left:
        one = left.pop()
        total += 1
        elements += 1
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif isinstance(one, int):
            total += one.bit_length() >> 3
        elif isinstance(one, Mapping):
            _refuse_long(one)
            left.extend(one.keys())
            left.extend(one.values())
        elif isinstance(one, (list, tuple, set, frozenset)):
            _refuse_long(one)
            left.extend(one)
        if total > MAX_WEIGHT:
            return total
        if elements + len(left) > MAX_ELEMENTS:
            raise BudgetError(f"it makes lists in lists of more than {MAX_ELEMENTS:,} elements")
    return total


def too_large() -> BudgetError:
    """The error for a value over the limit."""
    return BudgetError(f"it makes a value of more than {MAX_WEIGHT:,} characters or elements")


def too_long() -> BudgetError:
    """The error for a list over the limit."""
    return BudgetError(f"it makes a list of more than {MAX_ITEMS:,} elements")


def _refuse_long(value: Any) -> None:
    if len(value) > MAX_ITEMS:
        raise too_long()
