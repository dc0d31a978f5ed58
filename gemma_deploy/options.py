"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class GivenPath(click.Path):
    """A path as a `pathlib.Path`; "" is refused, which pathlib takes for the current directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click."""
        if value == "":
            self.fail("it is empty; name a file or a directory.", param, ctx)
        return super().convert(value, param, ctx)


class GivenName(click.types.StringParamType):
    """A name or a path as text; "" is refused, which a shell gives for a variable that is not set."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click."""
        if value == "":
            self.fail("it is empty; give a name or a path.", param, ctx)
        return super().convert(value, param, ctx)


PATH, NAME = GivenPath(), GivenName()


def adapter_option(what: str) -> Callable[[Command], Command]:
    """`--adapter DIR[:WEIGHT]`, repeatable; the command's argument `adapter` is a tuple of `AdapterRef`.

    Args:
        what: a sentence that says what the adapter does here.
    """
    return click.option(
        "--adapter", type=NAME, multiple=True, callback=_references, metavar="DIR[:WEIGHT]", help=f"{what} Repeatable."
    )


def _references(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Any:
    from gemma_deploy.checkpoint.adapters.merging import AdapterRef

    return tuple(AdapterRef.parse(value) for value in values)
