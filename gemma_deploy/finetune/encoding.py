"""Examples become token ids and labels: one BOS in front, -100 where nothing is to be learned, cut to a length.

The ids are those of the whole text, as TRL tokenizes it; which of them belong to an answer is told by the place of each
token in the text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma_deploy.errors import UsageError
from gemma_deploy.finetune.data import SHOWN, Example
from gemma_deploy.text import Tokenizer

IGNORED = -100  # a label that no loss counts, as in torch and transformers


@dataclass(frozen=True)
class Encoded:
    """One example.

    Args:
        where: its line, for messages.
        ids: token ids, BOS first; labels: the same, `IGNORED` where the loss does not count them.
        prompt: how many ids stand before the last answer; answer: that answer as text. For samples.
    """

    where: str
    ids: array[int]
    labels: array[int]
    prompt: int
    answer: str

    @property
    def learned(self) -> int:
        """Tokens that the loss counts: the first one is predicted by nothing."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Examples:
    """All examples of a file, and what became of them.

    Args:
        rows: those that are left; read: how many there were.
        cut: examples that were longer than the limit; dropped: of them those of whose answer nothing was left.
        longest: tokens of the longest one before it was cut.
    """

    rows: tuple[Encoded, ...]
    read: int
    cut: int = 0
    dropped: int = 0
    longest: int = 0

    @property
    def tokens(self) -> int:
        """Of all rows, BOS too."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def learned(self) -> int:
        """Tokens that the loss counts."""
        return sum(row.learned for row in self.rows)

    def __str__(self) -> str:
        said = f"{len(self.rows)} examples, {self.tokens} tokens, {self.learned} of them learned"
        if self.cut:
            said += f"; {self.cut} were longer and cut (the longest had {self.longest} tokens)"
        if self.dropped:
            said += f"; {self.dropped} left out, as nothing of the answer was left"
        return said


@dataclass
class _Counts:
    rows: list[Encoded] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    dropped: int = 0
    longest: int = 0


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    where: str,
    loss: str = "answers",
    too_long: str = "cut",
    progress: Callable[[float, float], None] | None = None,
) -> Examples:
    """Token ids and labels of examples.

    Args:
        examples: of read_examples.
        tokenizer: of the checkpoint; conversations are rendered with its chat template.
        max_length: tokens at most.
        where: the file, for messages.
        loss: "answers" or "all", see `FinetuneSettings`.
        too_long: "cut" what is longer at its end, or "refuse" it.
        progress: is called with examples done and all.

    Raises:
        UsageError: an example is too long and that is refused, the template refuses a conversation, or nothing is left.
    """
    counts = _Counts()
    for number, example in enumerate(examples):
        row = encode(example, tokenizer, loss=loss, where=where)
        counts.longest = max(counts.longest, len(row.ids))
        if len(row.ids) > max_length:
            counts.long.append(f"{row.where} has {len(row.ids)} tokens")
            row = Encoded(row.where, row.ids[:max_length], row.labels[:max_length], row.prompt, row.answer)
            if not row.learned:
                counts.dropped += 1
                continue
        counts.rows.append(row)
        if progress is not None:
            progress(number + 1, len(examples))
    if counts.long and too_long == "refuse":
        more = [f"and {len(counts.long) - SHOWN} more"] if len(counts.long) > SHOWN else []
        raise UsageError(
            f"{len(counts.long)} of {len(examples)} examples are longer than {max_length} tokens",
            where=where,
            problems=counts.long[:SHOWN] + more,
            expected=f"at most {max_length} tokens (finetune.max_length)",
            next_step="shorten them, raise max_length, or let them be cut (finetune.too_long: cut)",
        )
    if not counts.rows:
        raise UsageError(
            f"nothing is left to learn: of every example the answer begins after {max_length} tokens",
            where=where,
            next_step="raise max_length (finetune.max_length, --max-length)",
        )
    return Examples(tuple(counts.rows), len(examples), len(counts.long), counts.dropped, counts.longest)


def encode(example: Example, tokenizer: Tokenizer, *, loss: str, where: str) -> Encoded:
    """One example, uncut; see `encode_examples`."""
    text, answers = _text_of(example, tokenizer, where)
    ids, offsets = tokenizer.encode_with_offsets(text)
    while ids and ids[0] == tokenizer.bos_id:  # a template writes it, a text may
        del ids[0], offsets[0]
    ids, offsets = [tokenizer.bos_id, *ids], [(0, 0), *offsets]
    if answers and loss == "answers":
        inside = [any(stop > low and start < high for low, high in answers) for start, stop in offsets]
        labels = [number if learned else IGNORED for number, learned in zip(ids, inside, strict=True)]
    else:
        labels = list(ids)
    if answers:
        low, high = answers[-1]
        prompt = next((at for at, (_, stop) in enumerate(offsets) if stop > low), len(ids))
        answer = text[low:high]
    else:
        prompt = max(1, len(ids) // 2)
        answer = text[offsets[prompt][0] :] if prompt < len(ids) else ""
    return Encoded(example.where, array("i", ids), array("i", labels), prompt, answer)


def _text_of(example: Example, tokenizer: Tokenizer, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of an example, and where its answers begin and end in it."""
    if example.messages is not None and (tokenizer.chat or example.prompt is None):
        return _conversation(example, tokenizer, where)
    end = tokenizer.special_tokens.get("eos_token") or ""
    if example.text is not None:
        return _ended(example.text, end), []
    assert example.prompt is not None
    assert example.answer is not None
    text = _ended(example.prompt + example.answer, end)
    return text, [(len(example.prompt), len(text))]


def _ended(text: str, end: str) -> str:
    """With the token that ends a text, once."""
    return text if text.endswith(end) else text + end


def _conversation(example: Example, tokenizer: Tokenizer, where: str) -> tuple[str, list[tuple[int, int]]]:
    """As the chat template writes it; an answer is what follows the prompt that the model would be given."""
    assert example.messages is not None
    render = tokenizer.chat.render
    try:
        text = render(example.messages, add_generation_prompt=False)
        answers = []
        for number, one in enumerate(example.messages):
            if one["role"] != "assistant":
                continue
            before = render(example.messages[:number], add_generation_prompt=True)
            last = number == len(example.messages) - 1
            through = text if last else render(example.messages[: number + 1], add_generation_prompt=False)
            if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
                raise UsageError(
                    "the chat template writes an answer in another way than the prompt before it: which tokens are "
                    "the answer cannot be told",
                    next_step="count every token (finetune.loss: all, --loss all), or use another template",
                )
            answers.append((len(before), len(through)))
    except UsageError as error:
        raise UsageError(error.what, where=f"{where}, {example.where}", next_step=error.next_step) from error
    return text, answers


def split(examples: Examples, validation: float, seed: int) -> tuple[Examples, Examples | None]:
    """Hold some examples out.

    Args:
        examples: all of them.
        validation: a share below 1, or how many; 0: none.
        seed: of the choice; the order of both parts stays the file's.

    Returns:
        What is trained on, and what is held out, None where that is nothing.

    Raises:
        UsageError: nothing would be left to train on.
    """
    count = round(validation * len(examples.rows)) if validation < 1 else int(validation)
    if count >= len(examples.rows):
        raise UsageError(
            f"{count} examples are to be held out, and there are {len(examples.rows)}",
            where="finetune.validation (--validation)",
            expected="a share below 1, or fewer than there are",
            next_step="hold fewer out, or name a file of them (finetune.eval_data, --eval-data)",
        )
    if not count:
        return examples, None
    held = set(np.random.default_rng(seed).permutation(len(examples.rows))[:count].tolist())
    parts = [tuple(row for at, row in enumerate(examples.rows) if (at in held) is out) for out in (False, True)]
    return (
        Examples(parts[0], examples.read, examples.cut, examples.dropped, examples.longest),
        Examples(parts[1], count),
    )
