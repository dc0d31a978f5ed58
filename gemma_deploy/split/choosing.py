"""The next token from logits, and tokens one after the other until every sequence has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma_deploy.errors import UsageError
from gemma_deploy.split.passing import Hidden


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, in the words and with the code of transformers' `generate`.

    Args:
        temperature: 0 takes the likeliest token; above it logits are divided by it and a token is drawn.
        top_k: among so many likeliest alone, 0 for all; top_p: among the fewest that have this probability together.
        generator: of random numbers; torch's own by default.

    Raises:
        UsageError: a value that means nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        problems = [] if self.temperature >= 0 else [f"temperature: {self.temperature}, expected 0 or more"]
        problems += [] if self.top_k >= 0 else [f"top_k: {self.top_k}, expected 0 or more"]
        problems += [] if 0 < self.top_p <= 1 else [f"top_p: {self.top_p}, expected above 0 and at most 1"]
        if problems:
            raise UsageError("no token can be drawn like this", problems=problems, next_step="correct the values above")


def last_positions(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Hidden states [batch, hidden] of each sequence's last token that is no padding.

    Args:
        hidden: [batch, seq, hidden], of the last columns of attention_mask [batch, >= seq].
    """
    if attention_mask is None:
        return hidden[:, -1]
    here = attention_mask[:, -hidden.shape[1] :].to(hidden.device)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = (here.bool() * places).amax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def choose(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [batch, vocab] -> token ids [batch, 1]."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    scores = warpers(torch.empty(0), logits.float())
    return torch.multinomial(scores.softmax(-1), 1, generator=sampling.generator)


def continued(
    step: Callable[..., torch.Tensor],
    continue_with: Callable[..., Hidden],
    hidden: Hidden,
    *,
    at: Mapping[str, torch.Tensor | None],
    max_new_tokens: int,
    stops: Sequence[int],
    pad: int,
) -> torch.Tensor:
    """Token after token.

    Args:
        step: (hidden states, attention_mask, position_ids) -> token ids [batch, 1].
        continue_with: (token ids, attention_mask, position_ids if there are any) -> their hidden states.
        hidden, at: of the prompt, [batch, seq, hidden], its attention_mask and position_ids.

    Returns:
        Token ids [batch, new].

    Raises:
        UsageError: no token is asked for.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}", expected="at least 1", next_step="ask for a token")
    batch, length = hidden.shape[:2]
    mask, positions = at["attention_mask"], at["position_ids"]
    mask = torch.ones(batch, length, dtype=torch.int64, device=hidden.device) if mask is None else mask
    ended = torch.zeros(batch, 1, dtype=torch.bool, device=hidden.device)
    ends = torch.tensor(list(stops), dtype=torch.int64, device=hidden.device)
    tokens: list[torch.Tensor] = []
    while True:
        place = {"attention_mask": mask} | ({} if positions is None else {"position_ids": positions})
        if tokens:
            hidden = continue_with(tokens[-1], **place)
        found = step(hidden, **place).to(ended.device)
        tokens.append(found.masked_fill(ended, pad))
        ended = ended | torch.isin(found, ends)
        if len(tokens) == max_new_tokens or bool(ended.all()):
            return torch.cat(tokens, dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        positions = None if positions is None else positions[:, -1:] + 1
