"""Perplexity of one model, and of two with KL and top-1 agreement, over windows of text.

Every token but BOS is scored, given those before it in its window, with logits of a block of positions at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_deploy.evaluation.models import Evaluated, in_chunks, positions_at_once
from gemma_deploy.evaluation.texts import ScoredWindows
from gemma_deploy.machine import give_memory_back
from gemma_deploy.parity.metrics import Comparison, Metrics, log_softmax
from gemma_deploy.progress import Tick


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood.

    Args:
        value: of the tokens that have one; tokens: how many.
        error: standard error of `value`, tokens taken as independent draws: value * std(nll) / sqrt(tokens).
    """

    value: float
    error: float
    tokens: int

    @classmethod
    def of(cls, nll: np.ndarray) -> Perplexity:
        """nll: [tokens] in nats."""
        if not len(nll):
            return cls(math.nan, math.nan, 0)
        mean = float(nll.mean())
        value = math.exp(mean) if mean < 700 else math.inf
        error = value * float(nll.std(ddof=1)) / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
        return cls(value, error, len(nll))


@dataclass(frozen=True)
class Measured:
    """What the windows showed.

    Args:
        test, reference: perplexities; metrics: all that parity knows, of test against reference.
        bad: positions where the test's or the reference's logits are not all finite; no figure holds them.
    """

    test: Perplexity
    reference: Perplexity | None
    metrics: Metrics | None
    bad: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN and inf become None."""
        values: dict[str, Any] = {
            "scored_tokens": self.test.tokens,
            "perplexity": self.test.value,
            "perplexity_error": self.test.error,
            "bad_positions": self.bad,
        }
        if self.metrics is not None and self.reference is not None:
            found = self.metrics
            values |= {
                "perplexity_reference": self.reference.value,
                "perplexity_reference_error": self.reference.error,
                "perplexity_change": found.ppl_delta,
                "perplexity_change_error": found.ppl_error,
                "kl_mean": found.kl_mean,
                "kl_max": found.kl_max,
                "top1": found.top1,
                "near_ties": found.near_ties,
                "overturned": found.overturned,
            }
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def measure(
    test: Evaluated, reference: Evaluated | None, windows: ScoredWindows, *, progress: Tick | None = None
) -> Measured:
    """Score all windows.

    Args:
        progress: is called with windows done and windows in all.
    """
    models = [test] if reference is None else [reference, test]
    comparison, nll, bad = Comparison(), [], 0
    block = positions_at_once(test.vocab_size)
    for first, found in in_chunks(models, windows.ids):
        # Positions of all windows of the chunk in one row, so that the table is read as seldom as possible.
        at = [(i, p) for i in range(len(found[0])) for p in range(len(windows.ids[first + i]) - 1)]
        for start in range(0, len(at), block):
            part = at[start : start + block]
            logits = [
                model.source.head(np.stack([rows[i][p] for i, p in part]))
                for model, rows in zip(models, found, strict=True)
            ]
            for n, (i, p) in enumerate(part):
                target = windows.ids[first + i][p + 1]
                if reference is not None:
                    comparison.add(logits[0][n], logits[1][n], target, row=first + i)
                elif np.isfinite(logits[0][n]).all():
                    nll.append(-float(log_softmax(logits[0][n])[target]))
                else:
                    bad += 1
            del logits
            give_memory_back()
            if progress is not None:
                progress(first + len(found[0]) * min(1.0, (start + block) / len(at)), len(windows.ids))
    if reference is None:
        return Measured(Perplexity.of(np.array(nll)), None, None, bad)
    scores, metrics = comparison.likelihoods(), comparison.result()
    bad = metrics.positions - len(scores)
    return Measured(Perplexity.of(scores[:, 1]), Perplexity.of(scores[:, 0]), metrics, bad)
