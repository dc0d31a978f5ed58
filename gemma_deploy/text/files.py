"""The files that make a tokenizer: where they lie, what is read of them, and how a damaged one is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_deploy import reading
from gemma_deploy.errors import DeployError
from gemma_deploy.reading import FileKind

TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
SETTINGS, SPECIAL_TOKENS, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE, PROCESSOR_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
MAX_TEMPLATES = 100
_AGAIN = "copy it from where the weights came from"


class TokenizerFiles:
    """Reads the files of one tokenizer.

    Args:
        directory: where they lie.
        error: the class of the errors about them.
        contents: files that lie nowhere, by name (made from the header of a GGUF file); the directory is not read then.
    """

    def __init__(self, directory: Path, error: type[DeployError], contents: Mapping[str, bytes] | None = None) -> None:
        self.directory, self.error, self._contents = directory, error, contents

    def where(self, name: str) -> str:
        """The file, for messages."""
        return str(self.directory / name if self._contents is None else self.directory)

    def wrong(self, name: str, what: str, next_step: str = _AGAIN) -> DeployError:
        """The error that says `what` about a file."""
        return self.error(what, where=self.where(name), next_step=next_step)

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        if self._contents is not None:
            return name in self._contents
        return reading.exists(self.directory / name)

    def data(self, name: str) -> bytes | None:
        """Its bytes, without a byte order mark; None where it is not there."""
        if not self.has(name):
            return None
        if self._contents is not None:
            return self._contents[name]
        data = reading.read_bytes(self.directory / name, self._kind(name))
        return data.removeprefix(b"\xef\xbb\xbf")

    def text(self, name: str) -> str | None:
        """Its text, each line ended by one line feed; None where it is not there."""
        if not self.has(name):
            return None
        if self._contents is not None:
            text = self._contents[name].decode("utf-8")
        else:
            text = reading.read_text(self.directory / name, self._kind(name))
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def object(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file; None where it is not there."""
        if not self.has(name):
            return None
        if self._contents is not None:
            value = reading.parse_json(self._contents[name])
            assert isinstance(value, dict)
            return value
        return reading.read_object(self.directory / name, self._kind(name))

    def templates(self) -> dict[str, str]:
        """Every chat template by name; the one without a name is `default`.

        Files go before tokenizer_config.json, as in transformers, and chat_template.json, which it reads for
        processors alone, counts where there is no other.
        """
        found = {}
        if (text := self.text(TEMPLATE)) is not None:
            found["default"] = text
        for name in self.more_templates():
            found[Path(name).stem] = self.text(name) or ""
        if found:
            return found
        for name in (SETTINGS, PROCESSOR_TEMPLATE):
            said = (self.object(name) or {}).get("chat_template")
            if said is not None:
                return self._named(name, said)
        return {}

    def more_templates(self) -> list[str]:
        """The files of templates with a name of their own, relative to the directory."""
        folder = self.directory / MORE_TEMPLATES
        if self._contents is not None or not reading.is_dir(folder):
            return []
        try:
            names = sorted(one.name for one in folder.iterdir() if one.name.endswith(".jinja"))
        except OSError as error:
            raise self.wrong(MORE_TEMPLATES, f"cannot be read: {error.strerror or error}") from error
        if len(names) > MAX_TEMPLATES:
            raise self.wrong(MORE_TEMPLATES, f"holds {len(names)} templates; at most {MAX_TEMPLATES} are read")
        return [f"{MORE_TEMPLATES}/{name}" for name in names]

    def _named(self, file: str, value: Any) -> dict[str, str]:
        """`chat_template` of a JSON file: a text, a list of named texts, or an object of them."""
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, list):
            pairs = [(one.get("name"), one.get("template")) if isinstance(one, dict) else (None, None) for one in value]
        else:
            pairs = list(value.items()) if isinstance(value, dict) else [(None, None)]
        named = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
        if len(named) != len(pairs):
            raise self.error(
                "chat_template is neither a text nor a list of texts with different names",
                where=self.where(file),
                expected='"chat_template": "..." or [{"name": "default", "template": "..."}, ...]',
                next_step=_AGAIN,
            )
        return named

    def _kind(self, name: str) -> FileKind:
        expected = {TEMPLATE: "a Jinja template in UTF-8", SENTENCEPIECE: "a SentencePiece model"}
        return FileKind(self.error, expected.get(name, f"{name} as transformers writes it, in UTF-8"), _AGAIN)
