"""The loop that turns tokens into text, whoever computes them: prompt or messages in, pieces of text out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.errors import UsageError
from gemma_deploy.text import StopStrings, TextStream, Tokenizer

log = logging.getLogger(__name__)
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass
class GenerationStats:
    """What a generation did; complete when its iterator has ended.

    Args:
        tokens: generated ids, the stop token not among them.
        finish: "stop": the model or a stop string ended it; "length": max_new_tokens; "context": the cache is full;
            "cancelled": somebody asked for that; None: interrupted.
        stop_string: the one that ended it; its tokens are among `tokens`, its text was not yielded.
        load_seconds: opening the sessions; counted in neither of the others.
        prefill_seconds: until the first token's logits; decode_seconds: all steps after it.
        steps: of the graph after the first token where one may give several (lookup.py); 0 where each gives one.
    """

    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    finish: Literal["stop", "length", "context", "cancelled"] | None = None
    stop_string: str | None = None
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of the decode steps; 0 when there were none."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds and len(self.tokens) > 1 else 0.0


def encoded(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt of any kind."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    messages = [one for one in prompt if isinstance(one, Mapping)]
    return tokenizer.encode_chat(messages) if messages else [int(one) for one in prompt if not isinstance(one, Mapping)]


def check_length(max_new_tokens: int) -> None:
    """Refuse to generate nothing.

    Raises:
        UsageError: below 1.
    """
    if max_new_tokens < 1:
        raise UsageError(
            f"max_new_tokens is {max_new_tokens}", expected="1 or more", next_step="give a larger --max-new-tokens"
        )


def check_context(tokens: int, context_length: int, where: str, *, before: int = 0) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Args:
        tokens: of the prompt; before: there are already.

    Raises:
        UsageError: the context is too short for them.
    """
    if before + tokens >= context_length:
        prompt = f"the prompt has {tokens} tokens" if not before else f"with {tokens} more tokens on {before}"
        raise UsageError(
            f"{prompt}, this artifact's context is {context_length} tokens, the answer included",
            where=where,
            next_step="shorten it, or compile with a longer second length in frontend.shape.input_ids",
        )


def stop_token_ids(manifest: Manifest | None) -> tuple[int, ...]:
    """Every token that ends a text, from the manifest's `model.eos_token_ids`; empty without a manifest."""
    return manifest.model.eos_token_ids if manifest else ()


def stream_tokens(
    steps: Iterator[Sequence[int]],
    text: TextStream,
    stats: GenerationStats,
    *,
    max_new_tokens: int,
    stops: Container[int],
    full: Callable[[], int | None],
    strings: StopStrings | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """Take tokens until the text ends, and yield it in pieces.

    Args:
        steps: tokens of one step after another; what it adds to `stats.load_seconds` meanwhile is not its speed.
        stops: tokens that end the text, and are not of it.
        full: asked after every step: how many slots the context has, None while there is room.
        strings: texts that end the text, and are not of it.
        cancelled: asked before every step and after every token: whether the text is to end here.
    """
    strings = strings if strings is not None else StopStrings()
    while stats.finish is None:
        if cancelled():
            stats.finish = "cancelled"
            break
        taken = _timed(steps, stats)
        for token in taken:
            if token in stops:
                stats.finish = "stop"
                break
            stats.tokens.append(token)
            if piece := strings.push(text.push(token)):
                yield piece
            if ended := _ended(stats, max_new_tokens, strings, cancelled):
                stats.finish = ended
                break
        else:
            if slots := full():
                stats.finish = "context"
                log.warning("the context of %d slots is full: the text ends here", slots)
    if piece := strings.push(text.flush()) + strings.flush():
        yield piece
    if strings.found is not None:  # perhaps in what was held back to the end
        stats.finish, stats.stop_string = "stop", strings.found


def _timed(steps: Iterator[Sequence[int]], stats: GenerationStats) -> Sequence[int]:
    """The tokens of the next step; its seconds are counted."""
    loaded, started = stats.load_seconds, time.perf_counter()
    taken = next(steps)
    seconds = time.perf_counter() - started - (stats.load_seconds - loaded)
    if stats.tokens:
        stats.decode_seconds += seconds
    else:
        stats.prefill_seconds = seconds
    return taken


def _ended(
    stats: GenerationStats, max_new_tokens: int, strings: StopStrings, cancelled: Callable[[], bool]
) -> Literal["stop", "length", "cancelled"] | None:
    """Why a text ends after a token; None where it goes on."""
    if strings.found is not None:
        return "stop"
    if len(stats.tokens) == max_new_tokens:
        return "length"
    return "cancelled" if cancelled() else None
