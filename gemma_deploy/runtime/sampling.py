"""Choosing the next token: greedy, or temperature, top-k, top-p in transformers' order and meaning."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gemma_deploy.errors import UsageError


@dataclass
class Sampler:
    """Picks a token id from logits [V].

    Args:
        temperature: 0 is greedy (the lowest id among equals).
        top_k: keep the k largest logits (and those equal to the smallest of them); 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this; 1 keeps all.
        seed: of the generator; the same seed gives the same tokens.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    _generator: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        problems = []
        if self.temperature < 0:
            problems.append(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}, expected 0 (off) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if problems:
            raise UsageError("the sampling options make no sense", problems=problems)
        self._generator = np.random.default_rng(self.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """Logits: [V] float32 -> a token id."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        return int(self._generator.choice(len(logits), p=self.probabilities(logits)))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The distribution drawn from, float64 [V]."""
        scores = logits.astype(np.float64) / self.temperature
        if 0 < self.top_k < len(scores):
            threshold = np.partition(scores, -self.top_k)[-self.top_k]
            scores = np.where(scores < threshold, -np.inf, scores)
        probs = _softmax(scores)
        if self.top_p < 1:
            order = np.argsort(probs, kind="stable")  # ascending: what falls below 1 - p in all is dropped
            dropped = np.cumsum(probs[order]) <= 1 - self.top_p
            dropped[-1] = False
            scores[order[dropped]] = -np.inf
            probs = _softmax(scores)
        return probs


def _softmax(scores: np.ndarray) -> np.ndarray:
    exps = np.exp(scores - scores.max())
    return exps / exps.sum()
