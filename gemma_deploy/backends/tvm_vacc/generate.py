"""A sequence on the static pair: its prompt is read whole, then a token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from gemma_deploy.backends.tvm_vacc.runner import StaticRunner
from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.engine import Session
from gemma_deploy.runtime.generate import GenerationStats, stop_token_ids
from gemma_deploy.runtime.limits import check_tokens
from gemma_deploy.runtime.sampling import Sampler
from gemma_deploy.text import Tokenizer


class StaticSession(Session):
    """On our own runner: every reply reads all of the sequence again, for static graphs take prompts whole.

    Args:
        runner: of any batch; every row gets the same tokens and the first is read.
        sampler: greedy by default.
        stop_ids: tokens that end a reply; by default those of the artifact.
    """

    def __init__(
        self,
        runner: StaticRunner,
        tokenizer: Tokenizer,
        sampler: Sampler | None = None,
        *,
        stop_ids: Collection[int] | None = None,
    ) -> None:
        super().__init__(tokenizer, runner.path, stop_token_ids(runner.manifest) if stop_ids is None else stop_ids)
        self.runner = runner
        self.sampler = sampler if sampler is not None else Sampler()
        self.reset()

    def reset(self) -> None:
        """See `Session`."""
        self._ids: list[int] = []
        self._answer: Sequence[int] = ()  # of the last reply, as far as it came
        self._fed: list[int] = []  # what the runner has read

    @property
    def ids(self) -> list[int]:
        """See `Session`."""
        return [*self._ids, *self._answer]

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """See `Session`; a token behind a sequence that was read is one step."""
        before = self.ids
        if before and self._fed == before and len(ids) <= self.runner.remaining:
            check_tokens(ids, self.runner.contract.vocab_size, "tokens")
            for token in ids:
                logits = self._step(token)
        else:
            self._admitted(ids)
            logits = self._prefill([*before, *ids])
        self._ids, self._answer = [*before, *ids], ()
        return logits[0]

    def _admit(self, ids: list[int]) -> int:
        count, most = len(self.ids) + len(ids), self.runner.prefill_length
        if count > most:
            raise UsageError(
                f"the prompt has {count} tokens, this artifact takes {most} at most",
                where=str(self.path),
                next_step="shorten it, or compile with a longer first length in frontend.shape.input_ids",
            )
        check_tokens(ids, self.runner.contract.vocab_size, "prompt")
        return count

    def _full(self) -> int | None:
        return None if self.runner.remaining else self.runner.context_length

    def _steps(self, ids: list[int], stats: GenerationStats) -> Iterator[Sequence[int]]:
        self._ids, self._answer = [*self.ids, *ids], stats.tokens
        loaded = self.runner.load_seconds
        logits = self._prefill(self._ids)
        while True:
            stats.load_seconds += self.runner.load_seconds - loaded
            token = self.sampler(logits[:1])[0]
            yield [token]
            loaded = self.runner.load_seconds
            logits = self._step(token)

    def _prefill(self, ids: list[int]) -> np.ndarray:
        self._fed = []
        self.runner.reset()
        logits = self.runner.prefill([ids] * self.runner.batch)
        self._fed = list(ids)
        return logits

    def _step(self, token: int) -> np.ndarray:
        logits = self.runner.step([token] * self.runner.batch)
        self._fed.append(token)
        return logits
