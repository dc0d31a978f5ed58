"""Text out of an artifact, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemma_deploy.runtime.runner import StaticRunner
from gemma_deploy.runtime.sampling import Sampler
from gemma_deploy.runtime.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"


def generate_ids(
    runner: StaticRunner, prompt: Sequence[int], sampler: Sampler, *, max_new_tokens: int, stop: Sequence[int]
) -> Iterator[int]:
    """New token ids, the stop token not included; ends at the limit, a stop token or a full context."""
    logits = runner.prefill([list(prompt)])
    for n in range(max_new_tokens):
        token = sampler(logits[0])
        if token in stop:
            return
        yield token
        if n + 1 < max_new_tokens and runner.position < runner.context:
            logits = runner.step([token])
        else:
            return


def stream(
    runner: StaticRunner,
    tokenizer: TextTokenizer,
    prompt: str,
    sampler: Sampler,
    *,
    max_new_tokens: int = 64,
    stop: Sequence[int] = (),
) -> Iterator[str]:
    """Pieces of generated text; a character is yielded when all its bytes are there.

    Raises:
        UsageError: the prompt has more tokens than the artifact's prefill length.
    """
    ids: list[int] = []
    done = 0  # ids whose text is out
    prefix = 0  # ids decoded together with the new ones, for the tokenizer's sake (spaces between words)
    for token in generate_ids(runner, tokenizer.encode(prompt), sampler, max_new_tokens=max_new_tokens, stop=stop):
        ids.append(token)
        before, after = tokenizer.decode(ids[prefix:done]), tokenizer.decode(ids[prefix:])
        if len(after) > len(before) and not after.endswith(REPLACEMENT):
            yield after[len(before) :]
            prefix, done = done, len(ids)
    rest = tokenizer.decode(ids[prefix:])[len(tokenizer.decode(ids[prefix:done])) :]
    if rest:
        yield rest
