"""Which format a model speaks: its chat template tells, or else its special tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gemma_deploy.chat.format import ChatFormat
from gemma_deploy.chat.functiongemma import FUNCTION_GEMMA
from gemma_deploy.chat.gemma3 import GEMMA3
from gemma_deploy.chat.gemma4 import GEMMA4

# The first whose sign a template spells is the model's: one with more markers before one with fewer.
FORMATS = (GEMMA4, FUNCTION_GEMMA, GEMMA3)
PLAIN = ChatFormat(name="plain", sign="", turn="")  # a template of nobody we know: all it says is text


def choose_format(templates: Iterable[str], is_token: Callable[[str], bool]) -> ChatFormat:
    """The format of a model.

    Args:
        templates: its chat templates, as text.
        is_token: whether a text is one token of the model's.

    Returns:
        `PLAIN` where neither templates nor tokens are those of a known format. Tokens decide where somebody has put
        another template in the place of the model's own.
    """
    text = "\n".join(templates)
    for known in FORMATS:
        if known.sign in text:
            return known
    for known in FORMATS:
        if known.markers and all(map(is_token, known.markers)):
            return known
    return PLAIN


def format_named(name: str) -> ChatFormat:
    """The format that an artifact records.

    Raises:
        ValueError: this version knows none of that name.
    """
    known = {one.name: one for one in (*FORMATS, PLAIN)}
    if name not in known:
        raise ValueError(f"{name[:40]!r} is no chat format that this version knows: {', '.join(known)}")
    return known[name]


def known_format(name: str) -> str:
    """A name that `format_named` takes.

    Raises:
        ValueError: see there.
    """
    return format_named(name).name
