"""Text or chat messages to tokens with exactly one BOS, and tokens back to text, as transformers does both.

Of a checkpoint, of a GGUF file or of an artifact; needs the tokenizers library and, for chat, jinja2: neither torch nor
transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy import reading
from gemma_deploy.chat import ChatFormat, choose_format
from gemma_deploy.errors import ArtifactError, CheckpointError, DeployError, UsageError
from gemma_deploy.names import CONFIG
from gemma_deploy.text import gguf
from gemma_deploy.text.building import Built, build
from gemma_deploy.text.files import TOKENIZER, TokenizerFiles
from gemma_deploy.text.library import asking
from gemma_deploy.text.template import ChatTemplate, Message

if TYPE_CHECKING:
    from tokenizers import Encoding

    from gemma_deploy.checkpoint import Checkpoint


class Tokenizer:
    """The tokenizer of an artifact, or of a directory that is laid out like one.

    Args:
        directory: with tokenizer.json and what lies beside it.

    Attributes:
        path: the place it comes from.
        bos, bos_id: the token that begins every text, and its id.
        table_size: rows of the model's embedding table, which no id may reach; None where nobody says.

    Raises:
        ArtifactError: a file is missing or damaged, or there is no BOS token.
    """

    def __init__(self, directory: str | Path) -> None:
        files = TokenizerFiles(Path(directory), ArtifactError)
        self._take(files, build(files), _table_size(files))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer of a checkpoint: its files, or what a GGUF file holds.

        Raises:
            CheckpointError: a file is missing or damaged, or there is no BOS token.
        """
        files = files_of(checkpoint)
        made = cls.__new__(cls)
        made._take(files, build(files), checkpoint.config.vocab_size)
        return made

    def _take(self, files: TokenizerFiles, built: Built, table_size: int | None) -> None:
        self.path, self.table_size = files.directory, table_size
        self._files, self._names = files, built.names
        self.backend = built.backend
        self.bos = built.names.get("bos_token") or "<bos>"
        bos_id = self.backend.token_to_id(self.bos)
        if bos_id is None or bos_id >= (built.own_size if table_size is None else table_size):
            raise files.error(
                f"has no token {self.bos!r} to begin a text with",
                where=files.where(TOKENIZER),
                next_step="put the tokenizer of the checkpoint there",
            )
        self.bos_id = int(bos_id)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return int(self.backend.get_vocab_size())

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens by name: `bos_token`, `eos_token`, ..."""
        return self._names

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """The chat template, or one that refuses everything where the model has none.

        Raises:
            DeployError: its file is damaged.
        """
        return ChatTemplate(self._files.templates(), str(self.path), self._names)

    def chat_format(self) -> ChatFormat | None:
        """How the model marks its thinking and its tool calls; None where it has no chat template.

        Raises:
            DeployError: the template's file is damaged.
        """
        sources = self.chat.sources.values()
        return choose_format(sources, lambda token: self.id_of(token) is not None) if sources else None

    def tokens_of(self, texts: Iterable[str]) -> dict[int, str]:
        """The texts that are one token, by its id."""
        found = ((self.id_of(text), text) for text in texts)
        return {number: text for number, text in found if number is not None}

    @functools.cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that are never made of smaller ones: special ones, and others that were added."""
        return frozenset(self.backend.get_added_tokens_decoder())

    def id_of(self, token: str) -> int | None:
        """Id of a token by its text; None where there is no such token."""
        number = self.backend.token_to_id(token)
        return None if number is None else int(number)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text with exactly one BOS in front, whether or not the text spells one.

        Raises:
            UsageError: the text is no Unicode, or spells a token that the model does not have.
        """
        ids = self.encode_more(text)
        while ids and ids[0] == self.bos_id:
            del ids[0]
        return [self.bos_id, *ids]

    def encode_more(self, text: str) -> list[int]:
        """Tokens of a text that stands behind others: no BOS.

        Raises:
            UsageError: as `encode`.
        """
        return list(self._encoding(text).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a text without BOS, and the characters that each of them stands for: [start, stop) in the text.

        Raises:
            UsageError: as `encode`.
        """
        found = self._encoding(text)
        return list(found.ids), list(found.offsets)

    def _encoding(self, text: str) -> Encoding:
        refuse_half_characters(text)
        with asking(self._unencodable):
            found = self.backend.encode(text, add_special_tokens=False)
        ids = found.ids
        if ids and self.table_size is not None and max(ids) >= self.table_size:
            raise self._outside(max(ids))
        return found

    @functools.cached_property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What transformers puts in front of a text and behind it where special tokens are asked for.

        The post-processor of tokenizer.json decides alone: transformers drops `add_bos_token` and `add_eos_token` of
        tokenizer_config.json where that file is.
        """
        with asking(self._unencodable):
            found = self.backend.encode("a", add_special_tokens=True)
        special = list(found.special_tokens_mask)
        inside = [at for at, marked in enumerate(special) if not marked] or [len(special)]
        return tuple(found.ids[: inside[0]]), tuple(found.ids[inside[-1] + 1 :])

    def encode_framed(self, text: str, longest: int) -> tuple[list[int], int]:
        """Tokens of a text between those of `frame`, as transformers' tokenizer gives them with truncation.

        Args:
            longest: tokens there may be, those of the frame included.

        Returns:
            The tokens, and how many of the text's own did not fit.

        Raises:
            UsageError: as `encode`.
        """
        (front, back), ids = self.frame, self.encode_more(text)
        kept = ids[: max(0, longest - len(front) - len(back))]
        return [*front, *kept, *back], len(ids) - len(kept)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts of a data set, without BOS; half a surrogate pair in one becomes U+FFFD.

        Raises:
            CheckpointError: a text spells a token that the model does not have.
        """
        whole = [text if text.isascii() else replace_half_characters(text) for text in texts]
        with asking(self._unencodable):
            ids = [list(one.ids) for one in self.backend.encode_batch(whole, add_special_tokens=False)]
        largest = max([max(one) for one in ids if one], default=0)
        if self.table_size is not None and largest >= self.table_size:
            raise self._outside(largest)
        return ids

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Tokens of a conversation that the model is to continue; see `render_chat`."""
        return self.encode(self.render_chat(messages, **options))

    def render_chat(self, messages: Sequence[Message], **options: Any) -> str:
        """A conversation as the text that the model is to continue.

        Args:
            messages: {"role": "user" | "assistant" | ..., "content": text}, oldest first.
            options: tools, documents, names, see `ChatTemplate.render`.

        Raises:
            ChatTemplateError: there is no chat template, or it refuses the messages.
        """
        return self.chat.render(messages, add_generation_prompt=True, **options)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without the special ones."""
        with asking(self._undecodable):
            return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of tokens, the special ones included."""
        with asking(self._undecodable):
            return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def _outside(self, number: int) -> UsageError:
        token, only = self.backend.id_to_token(number), f"but the model has {self.table_size} tokens"
        if number not in self.added_ids:
            return UsageError(
                f"the tokenizer gives token {number}, {only}",
                where=str(self.path),
                expected="tokenizer and weights of the same model",
                next_step=f"copy {TOKENIZER} from where the weights came from",
            )
        return UsageError(
            f"the text spells {token!r}, which is token {number}, {only}",
            where=str(self.path),
            expected="text without it",
            next_step="take it out of the text, or copy the tokenizer's files again from where the weights came from",
        )

    def _unencodable(self, reason: str) -> DeployError:
        return self._files.wrong(TOKENIZER, f"makes no tokens of a text: {reason}")

    def _undecodable(self, reason: str) -> DeployError:
        return self._files.wrong(TOKENIZER, f"makes no text of tokens: {reason}")


def files_of(checkpoint: Checkpoint) -> TokenizerFiles:
    """The files of a checkpoint's tokenizer; those beside a GGUF file go before what it holds.

    Raises:
        CheckpointError: it has no tokenizer, or a GGUF file's is damaged.
    """
    if checkpoint.format != "gguf" or checkpoint.tokenizer_files():
        return TokenizerFiles(checkpoint.tokenizer_dir(), CheckpointError)
    if not gguf.has_vocabulary(checkpoint.path):
        raise CheckpointError(
            "holds no tokenizer: text cannot become tokens",
            where=str(checkpoint.path),
            expected="a vocabulary in the file, or the tokenizer's files beside it",
            next_step=f"put {TOKENIZER} and tokenizer_config.json of the model beside it",
        )
    return TokenizerFiles(checkpoint.path, CheckpointError, gguf.tokenizer_files(checkpoint.path))


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has a tokenizer, from the names of files or the header alone."""
    if checkpoint.tokenizer_files():
        return True
    return checkpoint.format == "gguf" and gguf.has_vocabulary(checkpoint.path)


def template_of(checkpoint: Checkpoint) -> ChatTemplate:
    """A checkpoint's chat template without its tokenizer, so without special tokens: to know whether there is one.

    Raises:
        CheckpointError: a file is damaged.
    """
    if checkpoint.format == "gguf" and not checkpoint.tokenizer_files():
        text = gguf.template_of(checkpoint.path)
        return ChatTemplate({} if text is None else {"default": text}, str(checkpoint.path))
    files = TokenizerFiles(checkpoint.tokenizer_dir(), CheckpointError)
    return ChatTemplate(files.templates(), str(files.directory))


def refuse_half_characters(text: str) -> None:
    """Refuse a text that holds half a surrogate pair: it is no Unicode, and tokens are made of Unicode.

    Raises:
        UsageError: with the place and, where it comes from a byte that is no UTF-8, the byte.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = f", the byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else ""
        raise UsageError(
            f"the text is not Unicode: character {error.start + 1} is half a surrogate pair (U+{code:04X}{byte})",
            expected="UTF-8",
            next_step="save or send the text as UTF-8",
        ) from None


def replace_half_characters(text: str) -> str:
    """A text with U+FFFD for every half of a surrogate pair, and with the character for two halves."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _table_size(files: TokenizerFiles) -> int | None:
    """`vocab_size` of the config.json beside the files."""
    if not reading.is_file(files.directory / CONFIG):
        return None
    size = (files.object(CONFIG) or {}).get("vocab_size")
    return size if type(size) is int and size > 0 else None
