"""Text from the static pair: a prompt read once, then a token at a time; sessions that go on from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.generate import GenerationStats, Prompt, check_length, encoded, speak, stop_token_ids
from gemma_deploy.runtime.sampling import Sampler
from gemma_deploy.text import TextStream, Tokenizer


def stream(
    runner: StaticRunner,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    sampler: Sampler | None = None,
    stop_ids: Sequence[int] | None = None,
    stats: GenerationStats | None = None,
) -> Iterator[str]:
    """Generate and yield text. Joined, the pieces are the text of all tokens; no piece ends inside a character.

    Args:
        runner: of any batch; every row gets the same prompt and the first is read.
        tokenizer: of the same artifact.
        prompt: a text to continue, chat messages to answer, or token ids as they are.
        max_new_tokens: at most so many.
        sampler: greedy by default.
        stop_ids: any of these ends it; `stop_token_ids` of the artifact by default.
        stats: filled in while it runs.

    Raises:
        UsageError: the prompt is longer than P, or max_new_tokens is below 1. Raised at once, before the first piece.
    """
    check_length(max_new_tokens)
    ids = encoded(tokenizer, prompt)
    if len(ids) > runner.prefill_length:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, this artifact takes {runner.prefill_length} at most",
            where=str(runner.path),
            next_step="shorten it, or compile with a longer first length in frontend.shape.input_ids",
        )
    stops = frozenset(stop_ids if stop_ids is not None else stop_token_ids(runner.manifest))
    stats = stats if stats is not None else GenerationStats()
    stats.prompt_tokens = len(ids)
    return speak(
        _steps(runner, ids, sampler or Sampler(), stats),
        TextStream(tokenizer),
        stats,
        max_new_tokens=max_new_tokens,
        stops=stops,
        full=lambda: None if runner.remaining else runner.context_length,
    )


class StaticSession:
    """On our own runner: every reply reads all of the sequence again, for static graphs take prompts whole."""

    def __init__(self, runner: StaticRunner, tokenizer: Tokenizer, sampler: Sampler | None = None) -> None:
        self.runner, self.tokenizer, self.sampler = runner, tokenizer, sampler
        self.ids: list[int] = []

    def reset(self) -> None:
        """See `Session`."""
        self.ids = []

    def reply(
        self, ids: Sequence[int], *, max_new_tokens: int = 128, stats: GenerationStats | None = None
    ) -> Iterator[str]:
        """See `Session`."""
        stats = stats if stats is not None else GenerationStats()
        sequence = [*self.ids, *ids]
        pieces = stream(
            self.runner, self.tokenizer, sequence, max_new_tokens=max_new_tokens, sampler=self.sampler, stats=stats
        )
        return self._kept(pieces, sequence, stats)

    def _kept(self, pieces: Iterator[str], sequence: list[int], stats: GenerationStats) -> Iterator[str]:
        try:
            yield from pieces
        finally:  # also of a reply that was interrupted
            self.ids = [*sequence, *stats.tokens]


def _steps(runner: StaticRunner, ids: list[int], sampler: Sampler, stats: GenerationStats) -> Iterator[Sequence[int]]:
    loaded = runner.load_seconds
    runner.reset()
    logits = runner.prefill([ids] * runner.batch)
    while True:
        stats.load_seconds, loaded = stats.load_seconds + runner.load_seconds - loaded, runner.load_seconds
        token = sampler(logits[:1])[0]
        yield [token]
        logits = runner.step([token] * runner.batch)
