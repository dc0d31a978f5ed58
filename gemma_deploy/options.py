"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

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


def server_options(what: str) -> Callable[[Command], Command]:
    """`--server URL`, `--model NAME` and `--api-key-file FILE`.

    Args:
        what: a sentence that says what becomes of a server here.
    """

    def with_options(command: Command) -> Command:
        key = click.option("--api-key-file", type=PATH, help="Holds the server's key.")
        model = click.option("--model", type=NAME, metavar="NAME", help="Of the server; its only one if not given.")
        return click.option("--server", type=NAME, metavar="URL", help=what)(model(key(command)))

    return with_options


def given_of(ctx: click.Context, names: Collection[str]) -> list[str]:
    """The options among these parameters of a command that somebody gave, in the order of the command."""
    return [
        param.opts[0]
        for param in ctx.command.params
        if param.name in names and ctx.get_parameter_source(param.name) is not ParameterSource.DEFAULT
    ]


def _references(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Any:
    from gemma_deploy.checkpoint.adapters.merging import AdapterRef

    return tuple(AdapterRef.parse(value) for value in values)
