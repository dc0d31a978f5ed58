"""What a server was asked and when its answers came, and the figures that follow.

Names are those of vLLM's `bench serve`: TTFT, time to the first token; TPOT, time per output token behind the first,
(E2EL - TTFT) / (tokens - 1); ITL, times between the pieces of a stream; E2EL, time to the end of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# What a limit may be set on: name -> the figure of one answer, in milliseconds.
MEASURES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Load:
    """Requests of one size, so many at a time.

    Args:
        input_tokens, output_tokens: of every request; concurrency: requests that are under way at any moment;
            requests: all of them.
    """

    input_tokens: int
    output_tokens: int
    concurrency: int
    requests: int


@dataclass
class Answer:
    """One answer of a server, in seconds of a monotonic clock.

    Args:
        sent: when the request left; pieces: when each piece of text came; ended: when the stream ended.
        tokens: of the answer, as the server counts them (`usage`); 0 where it does not say.
        cached: tokens of the prompt that it did not compute, where it says so.
        problem: why there is no answer, "" where there is one.
    """

    sent: float
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    cached: int = 0
    problem: str = ""

    @property
    def ttft(self) -> float:
        """Milliseconds to the first piece."""
        return (self.pieces[0] - self.sent) * 1e3

    @property
    def e2el(self) -> float:
        """Milliseconds to the end."""
        return (self.ended - self.sent) * 1e3

    @property
    def tpot(self) -> float | None:
        """Milliseconds a token behind the first; None where there is no other."""
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Milliseconds between pieces."""
        return [(later - sooner) * 1e3 for sooner, later in zip(self.pieces, self.pieces[1:], strict=False)]

    def holds(self, limits: Mapping[str, float]) -> bool:
        """Whether it came within all limits, in milliseconds; see `MEASURES`."""
        return all((value := getattr(self, name)) is None or value <= limit for name, limit in limits.items())


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, 95th and 99th percentile; None of nothing."""
    if not values:
        return None
    median, high, highest = np.percentile(values, (50, 95, 99))
    return {"mean": float(np.mean(values)), "median": float(median), "p95": float(high), "p99": float(highest)}


def summary(load: Load, answers: Sequence[Answer], limits: Mapping[str, float]) -> dict[str, Any]:
    """The figures of one load.

    Args:
        answers: of all requests; limits: what a good answer keeps to, see `Answer.holds`; {} for no goodput.
    """
    good = [answer for answer in answers if not answer.problem]
    problems = sorted({answer.problem for answer in answers if answer.problem})
    seconds = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    made = sum(answer.tokens for answer in good)
    return {
        "input_tokens": load.input_tokens,
        "output_tokens": load.output_tokens,
        "concurrency": load.concurrency,
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "problems": problems,
        "seconds": seconds,
        "requests_s": len(good) / seconds,
        "output_tok_s": made / seconds,
        "total_tok_s": (made + load.input_tokens * len(good)) / seconds,
        "goodput_requests_s": sum(answer.holds(limits) for answer in good) / seconds if limits else None,
        "output_tokens_made": made,
        "cached_tokens": sum(answer.cached for answer in good),
        "ttft_ms": spread([answer.ttft for answer in good]),
        "tpot_ms": spread([answer.tpot for answer in good if answer.tpot is not None]),
        "itl_ms": spread([gap for answer in good for gap in answer.gaps]),
        "e2el_ms": spread([answer.e2el for answer in good]),
    }
