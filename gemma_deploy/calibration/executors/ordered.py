"""What the executors have in common: results in order, and one thread of torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


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


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Shards are the parallelism; bits would depend on the number of torch's own threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
