"""The artifact's tokenizer, read with the `tokenizers` library alone (no torch, no transformers)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2.sandbox

from gemma_deploy.errors import ArtifactError, UsageError


class TextTokenizer:
    """Text to ids with exactly one BOS, ids to text.

    Args:
        path: directory with tokenizer.json.
        bos_token_id: of the model; None when it has none.

    Raises:
        ArtifactError: there is no tokenizer.json, or it cannot be read.
    """

    def __init__(self, path: Path, bos_token_id: int | None) -> None:
        from tokenizers import Tokenizer

        file = path / "tokenizer.json"
        if not file.is_file():
            raise ArtifactError(
                "there is no tokenizer.json: text cannot be tokenized",
                where=str(path),
                next_step="put tokenizer.json beside the checkpoint and compile again",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise ArtifactError(f"not a readable tokenizer: {error}", where=str(file)) from error
        self.path, self.bos_token_id = path, bos_token_id

    def encode(self, text: str) -> list[int]:
        """Ids with one BOS in front, whether or not the tokenizer or the text brings its own."""
        ids = self._tokenizer.encode(text).ids
        if self.bos_token_id is None:
            return ids
        while ids and ids[0] == self.bos_token_id:
            ids = ids[1:]
        return [self.bos_token_id, *ids]

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a conversation by the checkpoint's chat template, up to the model's turn.

        Raises:
            UsageError: the checkpoint has no chat template.
        """
        template = self._template()
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

        def refuse(message: str) -> None:
            raise UsageError(f"the chat template refuses the messages: {message}")

        environment.globals["raise_exception"] = refuse
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>", **self._special_tokens()}
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)

    def _config(self) -> dict[str, Any]:
        file = self.path / "tokenizer_config.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _special_tokens(self) -> dict[str, str]:
        found = {}
        for key in ("bos_token", "eos_token"):
            value = self._config().get(key)
            if value:
                found[key] = value["content"] if isinstance(value, dict) else value
        return found

    def _template(self) -> str:
        file = self.path / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.is_file() else self._config().get("chat_template")
        if not isinstance(template, str):
            raise UsageError(
                "the checkpoint has no chat template",
                where=str(self.path),
                next_step="use -p with plain text; chat needs an -it checkpoint",
            )
        return template
