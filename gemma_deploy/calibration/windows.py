"""Texts become calibration windows: shuffled by a seed, tokenized, joined, and cut to equal length with one BOS each.

Second step of calibration. Knows no data set and no model; `load_tokenizer` finds a checkpoint's tokenizer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.checkpoint import Checkpoint, write_tokenizer
from gemma_deploy.errors import CalibrationError, CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHUFFLE_BUFFER = 10_000  # texts: a C4 shard has 356,317 and is not read to its end
BATCH = 64
JOINT = "\n\n"


@dataclass(frozen=True)
class Windows:
    """What the model is shown.

    Args:
        ids: [nsamples, seqlen] int32, BOS in column 0 and nowhere else.
        texts_used: how many texts went into them.
    """

    ids: np.ndarray
    texts_used: int


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer, without padding and truncation.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    import tokenizers

    with tempfile.TemporaryDirectory() as scratch:  # a GGUF file's vocabulary has to be written out first
        files = {file.name: file for file in write_tokenizer(checkpoint, Path(scratch))}
        if "tokenizer.json" not in files:
            only = "only tokenizer.model is there" if "tokenizer.model" in files else "the tokenizer is missing"
            raise CheckpointError(
                f"{only}: text cannot become tokens",
                where=str(checkpoint.tokenizer_dir() / "tokenizer.json"),
                expected="the tokenizer.json the model was trained with",
                next_step="copy it there, or save one with transformers: AutoTokenizer.from_pretrained(DIR)"
                ".save_pretrained(DIR)",
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(files["tokenizer.json"]))
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(
                f"is not a tokenizer: {error}",
                where=str(checkpoint.tokenizer_dir() / "tokenizer.json"),
                next_step="copy it from where the weights came from",
            ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def shuffled(texts: Callable[[], Iterator[str]], seed: int) -> Iterator[str]:
    """The texts in an order that depends on the seed alone, holding `SHUFFLE_BUFFER` of them at a time."""
    import datasets

    def rows() -> Iterator[dict[str, str]]:
        for text in texts():
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(rows).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return (row["text"] for row in stream)


def cut_windows(
    texts: Iterable[str], tokenizer: Tokenizer, *, bos_id: int, vocab_size: int, nsamples: int, seqlen: int, where: str
) -> Windows:
    """Tokenize until there is enough, and cut.

    Args:
        texts: read only as far as needed.
        tokenizer: see `load_tokenizer`.
        bos_id: the token at the front of every window.
        vocab_size: tokens the model has.
        nsamples: windows.
        seqlen: tokens in each, BOS included.
        where: the texts' file, for messages.

    Raises:
        CalibrationError: too little text; CheckpointError: the tokenizer knows tokens the model does not.
    """
    body = seqlen - 1
    needed = nsamples * body
    tokens: list[int] = []
    used = 0
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        for encoding in tokenizer.encode_batch([text + JOINT for text in batch], add_special_tokens=False):
            if len(tokens) >= needed:
                break
            # A text may spell the BOS token; a second one inside a window is something the model was never shown.
            tokens += [token for token in encoding.ids if token != bos_id]
            used += 1
        if len(tokens) >= needed:
            break
    if len(tokens) < needed:
        raise _too_short(len(tokens), nsamples, seqlen, where)
    ids = np.full((nsamples, seqlen), bos_id, np.int32)
    ids[:, 1:] = np.asarray(tokens[:needed], np.int32).reshape(nsamples, body)
    if int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer gives token {int(ids.max())}, but the model has {vocab_size} tokens",
            where=where,
            expected="tokenizer and weights of the same model",
            next_step="copy tokenizer.json from where the weights came from",
        )
    return Windows(ids, used)


def _too_short(found: int, nsamples: int, seqlen: int, where: str) -> CalibrationError:
    fits = found // (seqlen - 1)
    if found == 0:
        return CalibrationError(
            "holds no text", where=where, expected="texts to calibrate on", next_step="give another file with --path"
        )
    lower = f"--nsamples {fits}" if fits else f"--seqlen {min(found, 128) + 1} --nsamples 1"
    return CalibrationError(
        f"too short: {found} tokens of text, {nsamples} windows of {seqlen} tokens need {nsamples * (seqlen - 1)}",
        where=where,
        expected=f"enough text for --nsamples {nsamples} --seqlen {seqlen}",
        next_step=f"ask for less ({lower}), or give a larger file with --path",
    )
