"""Conversations as the text an instruction-tuned model was trained on: the checkpoint's own chat template.

The template is applied by transformers' `apply_chat_template`, on a tokenizer that has the checkpoint's settings and
special tokens but no vocabulary: rendering needs none, and Gemma's takes 170 MiB and seconds to read a second time.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gemma_deploy.calibration.sources.reading import Turns
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
GGUF_KEY = "tokenizer.chat_template"


class Chat:
    """A checkpoint's chat template.

    Args:
        tokenizer: transformers' tokenizer that has the template.
        where: the template, for messages.
    """

    joint = ""  # a turn ends in a line break, and the next conversation begins as the next turn would

    def __init__(self, tokenizer: Any, where: str) -> None:
        self._tokenizer, self._where = tokenizer, where

    @classmethod
    def open(cls, checkpoint: Checkpoint, files: Path) -> Chat | None:
        """The template, or None where the checkpoint has none (a base model).

        Args:
            checkpoint: the model.
            files: directory with its tokenizer's files, see `checkpoint.write_tokenizer`.

        Raises:
            CheckpointError: the tokenizer's settings or the template are damaged.
        """
        if not has_template(checkpoint):
            return None
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        inside = _is_inside(checkpoint)
        place = checkpoint.path if inside else checkpoint.tokenizer_dir()
        try:
            with tempfile.TemporaryDirectory() as scratch:
                tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(Path(scratch) / "tokenizer.json"))
                for file in (files / CONFIG, files / TEMPLATE):
                    if file.exists():
                        shutil.copyfile(file, Path(scratch) / file.name)
                if inside:
                    (Path(scratch) / TEMPLATE).write_text(_gguf_template(checkpoint) or "", encoding="utf-8")
                return cls(PreTrainedTokenizerFast.from_pretrained(scratch), str(place))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"the tokenizer's settings cannot be read: {error}",
                where=str(place),
                expected=f"{CONFIG} and {TEMPLATE} as transformers writes them",
                next_step="copy them from where the weights came from",
            ) from error

    def render(self, turns: Turns) -> str:
        """A whole conversation, BOS spelled at its front where the template does so."""
        import jinja2

        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the chat template refuses a user's and a model's turn: {error}",
                where=self._where,
                expected="a template for conversations of `user` and `assistant`",
                next_step=f"copy {TEMPLATE} from where the weights came from, or remove it to use Alpaca's own prompt",
            ) from error


def has_template(checkpoint: Checkpoint) -> bool:
    """Whether conversations can be rendered, from small files or the GGUF header alone."""
    if _is_inside(checkpoint):
        return bool(_gguf_template(checkpoint))
    directory = checkpoint.tokenizer_dir()
    if (directory / TEMPLATE).exists():
        return True
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot be read: {error}",
            where=str(directory / CONFIG),
            next_step="copy it from where the weights came from",
        ) from error
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _is_inside(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer is that in a GGUF file, and no files beside it."""
    return checkpoint.format == "gguf" and not checkpoint.tokenizer_files()


def _gguf_template(checkpoint: Checkpoint) -> str | None:
    from gemma_deploy.checkpoint.gguf_header import read_gguf_header
    from gemma_deploy.checkpoint.mapped import MappedFile

    found = read_gguf_header(MappedFile(checkpoint.path)).metadata.get(GGUF_KEY)
    return found if isinstance(found, str) else None
