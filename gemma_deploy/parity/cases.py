"""What is fed to every model under comparison: prompts, and the tokens forced after them whatever a model would say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemma_deploy.checkpoint.config import ModelConfig


class Sizes(Protocol):
    """Of an artifact's graphs: rows, new tokens of a prompt, all tokens. A manifest's contract has them."""

    @property
    def batch(self) -> int: ...  # noqa: D102
    @property
    def prefill(self) -> int: ...  # noqa: D102
    @property
    def context(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class GivenSizes:
    """`Sizes` of no artifact."""

    batch: int
    prefill: int
    context: int


@dataclass(frozen=True)
class Case:
    """One batch of teacher-forced sequences.

    Attributes:
        name: "text" or "random": where the tokens are from.
        prompts: [B] token lists, BOS included; lengths may differ.
        forced: [B][steps] tokens fed one by one after the prompt.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    forced: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.forced) or len({len(row) for row in self.forced}) != 1:
            raise ValueError("every prompt needs as many forced tokens as the others")
        if not all(self.prompts):
            raise ValueError("an empty prompt has no last token to predict from")

    @property
    def steps(self) -> int:
        """Decode steps after the prefill."""
        return len(self.forced[0])

    @property
    def longest(self) -> int:
        """Tokens of the longest row, forced ones included."""
        return max(map(len, self.prompts)) + self.steps

    def sequence(self, row: int) -> tuple[int, ...]:
        """Prompt and forced tokens of one row."""
        return self.prompts[row] + self.forced[row]


def prompt_length(config: ModelConfig, prefill: int, asked: int) -> tuple[int, str]:
    """How long the prompts are, and a sentence about the sliding window.

    A prompt no longer than the window never shows a wrong window, so the prompts of the gate outgrow it where the
    artifact's prefill length allows. Where it does not, they are as long as was asked for: more would cost and not show
    more.

    Args:
        prefill: P of the artifact; asked: `parity.prompt_tokens` of the recipe.
    """
    window = config.sliding_window if "sliding_attention" in config.layer_types else None
    length = min(prefill, asked)
    if window is None:
        return length, ""
    if prefill > window:
        length = min(prefill, max(asked, window + max(8, window // 8)))
        return length, f"the prompts ({length} tokens) are longer than the sliding window ({window})"
    return length, (
        f"the sliding window ({window}) is not reached: prefill takes {prefill} tokens; compile with a longer first "
        "length in frontend.shape.input_ids to have it checked"
    )


def make_cases(
    config: ModelConfig, *, batch: int, length: int, steps: int, text: Sequence[int] | None, seed: int = 0
) -> list[Case]:
    """A case of real text (where there are tokens of it) and one of random tokens.

    Rows differ in length, so that left padding is part of what is compared.

    Args:
        length: of the longest prompt, BOS included; steps: decode steps.
        text: tokens without BOS, or None.
    """
    bos = config.bos_token_id if config.bos_token_id is not None else 0
    lengths = [max(1, length - row * max(1, length // (2 * batch))) for row in range(batch)]
    rng = np.random.default_rng(seed)
    cases = []
    if text is not None and len(text) > steps + 1:
        rows = []
        for row, wanted in enumerate(lengths):
            prompt = min(wanted, len(text) - steps + 1)
            start = (row * len(text) // batch) % max(1, len(text) - steps - prompt + 2)
            rows.append(((bos, *text[start : start + prompt - 1]), tuple(text[start + prompt - 1 :][:steps])))
        cases.append(Case("text", tuple(row[0] for row in rows), tuple(row[1] for row in rows)))
    drawn = [rng.integers(0, config.vocab_size, size=wanted - 1 + steps).tolist() for wanted in lengths]
    pairs = [((bos, *ids[: n - 1]), tuple(ids[n - 1 :])) for ids, n in zip(drawn, lengths, strict=True)]
    cases.append(Case("random", tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)))
    return cases
