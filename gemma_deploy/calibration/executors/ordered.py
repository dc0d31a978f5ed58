"""What the executors have in common: results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any


def in_order(
    submit: Callable[[Any], Any], result: Callable[[Any], Any], items: Iterable[Any], *, ahead: int
) -> Generator[Any, None, None]:
    """Results in the order of the items.

    Args:
        submit: begins one and returns what `result` takes, which waits for it.
        ahead: begun and not yet taken at a time.
    """
    begun: deque[Any] = deque()
    for item in items:
        begun.append(submit(item))
        if len(begun) >= ahead:
            yield result(begun.popleft())
    while begun:
        yield result(begun.popleft())
