"""A tokenizer as llama.cpp has those of Gemma: texts, scores and kinds of tokens, and from Gemma 4 on merges.

Without merges it joins the pair whose piece has the highest score. Merges of a Gemma stand in the order of the
pieces' ids, so that ids make scores where no tokenizer.model says them.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from gemma_deploy.architectures import Gguf
from gemma_deploy.text.building import build
from gemma_deploy.text.files import SENTENCEPIECE, TokenizerFiles
from gemma_deploy.text.pipeline import SPACE
from gemma_deploy.text.sentencepiece import read_pieces

log = logging.getLogger(__name__)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NO_SCORE = -10000.0  # of rows of the token table that no token has
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
UNUSED_PIECE = re.compile(r"<unused\d+>")  # control tokens for llama.cpp, whatever the files say
PIECES = "llama"  # the kind of tokenizer that has scores alone
UNKNOWN_PIECE, FIRST_BYTE = "<unk>", "<0x00>"


@dataclass(frozen=True)
class Vocabulary:
    """One entry for each row of the token table; `unknown` is the id of the token for what is none."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    unknown: int | None
    merges: list[str] = field(default_factory=list)


def vocabulary_of(files: TokenizerFiles, size: int, row: Gguf) -> Vocabulary:
    """The vocabulary of a tokenizer's files, as many entries as the token table has rows, for a row of architectures.

    Raises:
        CheckpointError: they are damaged.
    """
    built = build(files)
    added = built.backend.get_added_tokens_decoder()
    words = built.backend.get_vocab(with_added_tokens=True)
    if FIRST_BYTE not in words:
        log.warning("%s: no tokenizer of SentencePiece: llama.cpp makes other tokens of a text", files.directory)
    data = files.data(SENTENCEPIECE)
    pieces = [] if data is None else read_pieces(data)
    tokens, scores, kinds = [f"[PAD{index}]" for index in range(size)], [NO_SCORE] * size, [UNUSED] * size
    for text, index in words.items():
        if index >= size:
            continue
        tokens[index], scores[index], kinds[index] = text, -float(index), NORMAL
        if text == UNKNOWN_PIECE:
            kinds[index] = UNKNOWN
        elif index in added:
            special = text not in row.shown and (added[index].special or UNUSED_PIECE.fullmatch(text) is not None)
            kinds[index] = CONTROL if special else USER_DEFINED
            tokens[index] = text if special else text.replace(SPACE, " ")
        elif BYTE_PIECE.fullmatch(text):
            kinds[index] = BYTE
        if index < len(pieces):
            scores[index] = pieces[index].score
    merges = [] if row.tokenizer == PIECES else _merges(built.backend)
    return Vocabulary(tokens, scores, kinds, words.get(UNKNOWN_PIECE), merges)


def _merges(backend: Any) -> list[str]:
    """Pairs of pieces that become one, the first first, with a space between them: no piece of a Gemma has one."""
    merges = json.loads(backend.to_str())["model"].get("merges", [])
    return [one if isinstance(one, str) else " ".join(one) for one in merges]
