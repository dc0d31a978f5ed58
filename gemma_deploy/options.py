"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def adapter_option(what: str) -> Callable[[Command], Command]:
    """`--adapter DIR[:WEIGHT]`, repeatable; the command's argument `adapter` is a tuple of `AdapterRef`.

    Args:
        what: a sentence that says what the adapter does here.
    """
    return click.option(
        "--adapter", multiple=True, callback=_references, metavar="DIR[:WEIGHT]", help=f"{what} Repeatable."
    )


def _references(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Any:
    from gemma_deploy.checkpoint.adapters.merging import AdapterRef

    return tuple(AdapterRef.parse(value) for value in values)
