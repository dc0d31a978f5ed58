"""Conversations: which tokens a message adds to those the model has seen; an engine's session goes on with them.

What a model said stays as the tokens it chose, which are not always those its text would be given again.
"""

from __future__ import annotations

import uuid

from gemma_deploy.errors import UsageError
from gemma_deploy.text import Tokenizer

NO_SYSTEM = "leave --system out, and say it in the first message"


class Conversation:
    """The turns so far, and the tokens of the next one.

    Args:
        system: what the model is told beforehand.

    Raises:
        UsageError: the model has no chat template, or its template has no place for `system`.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        mark = uuid.uuid4().hex
        trial, first = [{"role": "system", "content": mark}] if system else [], {"role": "user", "content": "-"}
        try:
            shown = tokenizer.render_chat([*trial, first])
        except UsageError as error:
            if system:
                tokenizer.render_chat([first])  # what is wrong without it too is said as it is
                error = UsageError(error.what, where=error.where, next_step=NO_SYSTEM)
            raise error from None
        if system and mark not in shown:
            raise UsageError(
                "the chat template leaves a system message out", where=str(tokenizer.path), next_step=NO_SYSTEM
            )

    def ask(self, text: str) -> list[int]:
        """Tokens that a message adds, those that end the reply before it included. The conversation is as it was.

        Raises:
            UsageError: the chat template refuses the messages, or leaves replies out.
        """
        message = {"role": "user", "content": text}
        if not self._turns:
            return self._tokenizer.encode_chat([*self._system, message])
        mark = uuid.uuid4().hex
        reply = {"role": "assistant", "content": mark}
        rendered = self._tokenizer.render_chat([*self._system, *self._turns[:-1], reply, message])
        _, found, after = rendered.rpartition(mark)
        if not found:
            raise UsageError("the chat template leaves replies out", where=str(self._tokenizer.path))
        return self._tokenizer.encode_more(after)

    def answered(self, text: str, reply: str) -> None:
        """Add the model's turn to the conversation."""
        self._turns += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]

    def reset(self) -> None:
        """Forget the turns; what the model is told beforehand stays."""
        self._turns = []
