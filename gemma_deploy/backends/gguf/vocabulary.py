"""A tokenizer as llama.cpp has those of SentencePiece: texts, scores and kinds of tokens, and no merges.

It joins the pair whose piece has the highest score. Merges of a Gemma stand in the order of the pieces' ids, so that
ids make scores where no tokenizer.model says them.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from gemma_deploy.text.building import build
from gemma_deploy.text.files import SENTENCEPIECE, TokenizerFiles
from gemma_deploy.text.pipeline import SPACE
from gemma_deploy.text.sentencepiece import read_pieces

log = logging.getLogger(__name__)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NO_SCORE = -10000.0  # of rows of the token table that no token has
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
UNUSED_PIECE = re.compile(r"<unused\d+>")  # control tokens for llama.cpp, whatever the files say
UNKNOWN_PIECE, FIRST_BYTE = "<unk>", "<0x00>"


@dataclass(frozen=True)
class Vocabulary:
    """One entry for each row of the token table; `unknown` is the id of the token for what is none."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    unknown: int | None


def vocabulary_of(files: TokenizerFiles, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer's files, as many entries as the token table has rows.

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
            special = added[index].special or UNUSED_PIECE.fullmatch(text) is not None
            kinds[index] = CONTROL if special else USER_DEFINED
            tokens[index] = text if special else text.replace(SPACE, " ")
        elif BYTE_PIECE.fullmatch(text):
            kinds[index] = BYTE
        if index < len(pieces):
            scores[index] = pieces[index].score
    return Vocabulary(tokens, scores, kinds, words.get(UNKNOWN_PIECE))
