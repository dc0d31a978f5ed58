"""Adapters that texts are computed with, by number: one that was unloaded goes when the last text with it has ended."""

from __future__ import annotations

from collections.abc import Callable

from gemma_deploy.errors import UsageError

MOST = 64  # adapters of a model at once


class NoAdapterError(UsageError):
    """An adapter is not loaded, or not any more."""


class Adapters:
    """See the module. Number 0 stands for the model alone, which is always there.

    Args:
        forget: called with the number of an adapter that nobody needs any more.
    """

    def __init__(self, forget: Callable[[int], None]) -> None:
        self._forget, self._users, self._leaving = forget, dict[int, int](), set[int]()

    def __len__(self) -> int:
        return len(self._users) - len(self._leaving)

    def refuse_more(self) -> None:
        """See that there is room for one more.

        Raises:
            UsageError: there is none.
        """
        if len(self._users) >= MOST:
            raise UsageError(
                f"{MOST} adapters are loaded, which is all there may be", next_step="unload one that is not needed"
            )

    def add(self, number: int) -> None:
        """One that was loaded."""
        self._users[number] = 0

    def take(self, number: int) -> None:
        """A text more needs it.

        Raises:
            NoAdapterError: it is not loaded.
        """
        if number:
            self._check(number)
            self._users[number] += 1

    def give_back(self, number: int) -> None:
        """A text that needed it has ended."""
        if number:
            self._users[number] -= 1
            self._forget_unused(number)

    def unload(self, number: int) -> None:
        """No further text may take it.

        Raises:
            NoAdapterError: it is not loaded.
        """
        self._check(number)
        self._leaving.add(number)
        self._forget_unused(number)

    def _check(self, number: int) -> None:
        if number not in self._users or number in self._leaving:
            raise NoAdapterError("the adapter is not loaded any more", next_step="name one that is: /v1/models")

    def _forget_unused(self, number: int) -> None:
        if number in self._leaving and not self._users[number]:
            self._leaving.remove(number)
            del self._users[number]
            self._forget(number)
