"""An artifact's tokenizer: text or chat messages to tokens with exactly one BOS, and tokens back to text in pieces.

Reads tokenizer.json with `tokenizers` and chat_template.jinja with jinja2; neither torch nor transformers is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_deploy.errors import ArtifactError, UsageError

HALF = "\N{REPLACEMENT CHARACTER}"  # what `tokenizers` decodes the first bytes of a character to


class Tokenizer:
    """tokenizer.json and what lies beside it.

    Args:
        directory: an artifact or a checkpoint.

    Raises:
        ArtifactError: tokenizer.json is missing or damaged, or has no BOS token.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        self._tokenizer = _load(self.path / "tokenizer.json")
        self._config = _read_json(self.path / "tokenizer_config.json")
        bos = _token_text(self._config.get("bos_token")) or "<bos>"
        bos_id = self._tokenizer.token_to_id(bos)
        if bos_id is None:
            raise ArtifactError(
                f"has no token {bos!r} to begin a text with",
                where=str(self.path / "tokenizer.json"),
                next_step="put the tokenizer of the checkpoint there",
            )
        self.bos, self.bos_id = bos, int(bos_id)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Tokens of a text with exactly one BOS in front, whether or not the text spells one."""
        ids = self.encode_more(text)
        while ids and ids[0] == self.bos_id:
            del ids[0]
        return [self.bos_id, *ids]

    def encode_more(self, text: str) -> list[int]:
        """Tokens of a text that stands behind others: no BOS."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation that the model is to continue; see `render_chat`."""
        return self.encode(self.render_chat(messages))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as the text that the model is to continue.

        Args:
            messages: {"role": "user" | "assistant" | ..., "content": text}, oldest first.

        Raises:
            UsageError: the artifact has no chat template, or the template refuses the messages.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(reason: str) -> None:
            raise jinja2.TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        special = {key: _token_text(value) for key, value in self._config.items() if key.endswith("_token")}
        names = {**special, "bos_token": self.bos}
        try:
            template = environment.from_string(self._chat_template())
            return template.render(messages=list(messages), add_generation_prompt=True, **names)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template refuses the messages: {error}", where=str(self.path)) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without the special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _chat_template(self) -> str:
        file = self.path / "chat_template.jinja"
        if file.exists():
            return file.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, str):
            return template
        raise UsageError(
            "this model has no chat template: it continues text but was not taught to talk",
            where=str(self.path),
            next_step="use `gemma-deploy run ARTIFACT -p TEXT`, or compile an instruction-tuned checkpoint (-it)",
        )


class TextStream:
    """Turns tokens into text as they come, holding a character back until its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # first token decoded again, so that spaces between tokens come out right
        self._shown = 0  # first token not yet shown

    def push(self, token: int) -> str:
        """Add a token; the text that is complete now, or ''."""
        self._ids.append(token)
        fresh = self._fresh()
        if not fresh or fresh.endswith(HALF):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return fresh

    def flush(self) -> str:
        """What was held back, without half characters."""
        fresh = self._fresh().rstrip(HALF)
        self._context = self._shown = len(self._ids)
        return fresh

    def _fresh(self) -> str:
        shown = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(shown) :]


def _load(file: Path) -> Any:
    import tokenizers

    if not file.exists():
        raise ArtifactError(
            "the tokenizer is missing: the model can only be given token ids",
            where=str(file),
            next_step="copy tokenizer.json and tokenizer_config.json of the checkpoint there and compile again",
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ArtifactError(
            f"is not a tokenizer: {error}", where=str(file), next_step="copy it from the checkpoint again"
        ) from error
    tokenizer.no_padding()  # of batches in training; a prompt must neither be cut nor filled up
    tokenizer.no_truncation()
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"is not JSON: {error}", where=str(file), next_step="copy it again") from error
    return values if isinstance(values, dict) else {}


def _token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json is a string or {"content": string}."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
