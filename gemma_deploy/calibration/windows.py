"""Texts become calibration windows: shuffled by a seed, tokenized, joined, and cut to equal length with one BOS each.

Second step of calibration. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_deploy.calibration.chat import Chat
from gemma_deploy.calibration.datasets import Located
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CalibrationError, CheckpointError, UsageError
from gemma_deploy.text import Tokenizer

SHUFFLE_BUFFER = 10_000  # texts: a C4 shard has 356,317 and is not read to its end
BATCH, BATCH_CHARACTERS = 64, 4 << 20
JOINT = "\n\n"
# Windows cut for each one kept, where there is text enough: a long text would fill many that lie side by side.
SPREAD = 4


@dataclass(frozen=True)
class TokenWindows:
    """What the model is shown.

    Args:
        ids: [nsamples, seqlen] int32, BOS in column 0 and nowhere else.
        texts_used: how many texts of each data set went into them.
    """

    ids: np.ndarray
    texts_used: Mapping[str, int]


@dataclass(frozen=True)
class Cut:
    """The windows of one data set.

    Args:
        ids: [windows, seqlen] int32.
        texts_used: how many texts went into them.
    """

    ids: np.ndarray
    texts_used: int


def load_tokenizer_and_chat(checkpoint: Checkpoint, *, chat: bool = True) -> tuple[Tokenizer, Chat | None]:
    """The checkpoint's tokenizer and its chat template.

    Args:
        chat: whether to look for a template.

    Raises:
        CheckpointError: there is no tokenizer, or a file of it is damaged.
    """
    tokenizer = Tokenizer.of(checkpoint)
    return tokenizer, Chat(tokenizer.chat) if chat and tokenizer.chat else None


def shuffled(texts: Callable[[], Iterator[str]], seed: int) -> Iterator[str]:
    """The texts in an order that depends on the seed alone, holding `SHUFFLE_BUFFER` of them at a time."""
    import datasets

    def rows() -> Iterator[dict[str, str]]:
        for text in texts():
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(rows).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return (row["text"] for row in stream)


def cut_windows(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    located: Located,
    *,
    bos_id: int,
    seqlen: int,
    joint: str = JOINT,
) -> Cut:
    """Tokenize until there is enough, cut, and keep every fourth window (every one where the text is that short).

    Args:
        texts: read only as far as needed.
        tokenizer: of the model.
        located: the texts' data set: how many windows, and the place for messages.
        bos_id: the token at the front of every window.
        seqlen: tokens in each, BOS included.
        joint: what stands behind every text.

    Raises:
        CalibrationError: too little text; CheckpointError: a text spells a token that the model does not have.
    """
    body = seqlen - 1
    wanted = SPREAD * located.windows * body
    tokens: list[int] = []
    used = 0
    for batch in _batches(texts, located):
        for ids_of_text in _encoded([text + joint for text in batch], tokenizer, located):
            if len(tokens) >= wanted:
                break
            # A text may spell the BOS token; a second one inside a window is something the model was never shown.
            tokens += [token for token in ids_of_text if token != bos_id]
            used += 1
        if len(tokens) >= wanted:
            break
    cut = min(len(tokens) // body, SPREAD * located.windows)
    if cut < located.windows:
        raise _too_short(len(tokens), seqlen, located)
    ids = np.full((located.windows, seqlen), bos_id, np.int32)
    kept = slice(0, None, cut // located.windows)
    ids[:, 1:] = np.asarray(tokens[: cut * body], np.int32).reshape(cut, body)[kept][: located.windows]
    return Cut(ids, used)


def _batches(texts: Iterable[str], located: Located) -> Iterator[list[str]]:
    """At most `BATCH` texts at once, and about `BATCH_CHARACTERS`: a token takes a hundred bytes while it is made."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if len(text) > BATCH_CHARACTERS:
            raise CalibrationError(
                f"a text has {len(text)} characters",
                where=located.where,
                expected=f"texts of at most {BATCH_CHARACTERS} characters",
                next_step="cut it into several texts",
            )
        if len(batch) == BATCH or size + len(text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _encoded(texts: Sequence[str], tokenizer: Tokenizer, located: Located) -> list[list[int]]:
    """Token ids of each text."""
    try:
        return tokenizer.encode_batch(texts)
    except UsageError as error:
        raise CheckpointError(
            error.what, where=located.where, expected=error.expected, next_step=error.next_step
        ) from error


def _too_short(found: int, seqlen: int, located: Located) -> CalibrationError:
    fits, windows = found // (seqlen - 1), located.windows
    option = f"--path {located.name}=FILE" if located.mixed else "--path FILE"
    if found == 0:
        return CalibrationError(
            "holds no text",
            where=located.where,
            expected="texts to calibrate on",
            next_step=f"give another file with {option} (in a recipe: dataset.path)",
        )
    asked, fewer = f"--nsamples {windows} --seqlen {seqlen}", f"--nsamples {fits}"
    if located.mixed:
        asked, fewer = f"{located.name}:{windows} with --seqlen {seqlen}", f"{located.name}:{fits}"
    lower = fewer if fits else f"--seqlen {min(found, 128) + 1}{'' if located.mixed else ' --nsamples 1'}"
    real = f"{'the real data set' if located.bundled else 'a larger file'} with {option}"
    real += " (hub in its place streams it; in a recipe: dataset.path)"
    return CalibrationError(
        f"too short: {found} tokens of text, {windows} windows of {seqlen} tokens need {windows * (seqlen - 1)}",
        where=located.where,
        expected=f"enough text for {asked}",
        next_step=f"ask for less ({lower}), or give {real}",
    )
