"""How the tokens of a request are chosen: `Choice`, and a `Chooser` that keeps count of what was said.

`runtime.sampling.Sampler` chooses in the same way, and the same token for the same seed but where float32 and float64
round the border between two tokens differently. It sorts all logits, in float64; here those that may be kept are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.sampling import SMALLEST, Sampling
from gemma_deploy.serve.guiding import Guide

BLOCK = 512  # logits whose weights are added up together
MOST_BIAS = 1e6


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen.

    Args:
        temperature, top_k, top_p, seed: see `Sampling`.
        min_p: keep tokens whose probability is this part of the largest one's or more; applied last.
        repetition: divides logits above 0, and multiplies those below, of tokens that the prompt or the text holds.
        presence: taken off the logits of tokens that the text holds; frequency: the same for every time.
        bias: added to the logits of these tokens.
        min_tokens: no stop token is chosen before so many tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0

    def check(self, vocabulary: int) -> None:
        """Refuse values out of their ranges, all at once.

        Raises:
            UsageError: naming them.
        """
        problems: list[str] = []
        try:
            Sampling(self.temperature, self.top_k, self.top_p, self.seed)
        except UsageError as error:
            problems += error.problems
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p {self.min_p}: 0 to 1")
        if not 0 < self.repetition < np.inf:
            problems.append(f"repetition_penalty {self.repetition}: above 0")
        for name, value in (("presence_penalty", self.presence), ("frequency_penalty", self.frequency)):
            if not np.isfinite(value):
                problems.append(f"{name} {value}: a number")
        if self.min_tokens < 0:
            problems.append(f"min_tokens {self.min_tokens}: 0 or more")
        for token, bias in self.bias.items():
            if not 0 <= token < vocabulary:
                problems.append(f"logit_bias of token {token}: tokens are 0 to {vocabulary - 1}")
            elif not -MOST_BIAS <= bias <= MOST_BIAS:
                problems.append(f"logit_bias {bias} of token {token}: -{MOST_BIAS:g} to {MOST_BIAS:g}")
        if problems:
            raise UsageError(
                "tokens cannot be chosen like this", problems=problems[:20], next_step="give values of these ranges"
            )


class Chooser:
    """Chooses the tokens of one request, one after the other.

    Args:
        prompt: its tokens; stops: tokens that end the text.
        guide: says which tokens may come next; it goes along with what is said.
    """

    def __init__(
        self,
        choice: Choice,
        prompt: Sequence[int] | np.ndarray,
        stops: Collection[int],
        *,
        guide: Guide | None = None,
    ) -> None:
        self._guide = guide
        self._choice, self._stops = choice, np.array(sorted(stops), np.int64)
        self._random = np.random.default_rng(choice.seed) if choice.temperature > 0 else None
        self._bias_ids = np.array(list(choice.bias), np.int64)
        self._biases = np.array(list(choice.bias.values()), np.float32)
        self._counts: dict[int, int] = {}  # of tokens said
        self._seen = np.unique(np.asarray(prompt, np.int64)) if choice.repetition != 1 else np.zeros(0, np.int64)
        self._said = 0
        self._penalties = choice.presence != 0 or choice.frequency != 0

    @property
    def greedy(self) -> bool:
        """Whether the token of the largest logit is taken as it is."""
        return self._random is None and not self._changes

    @property
    def _changes(self) -> bool:
        choice = self._choice
        return bool(
            self._guide is not None
            or len(self._bias_ids)
            or choice.repetition != 1
            or self._penalties
            or (self._said < choice.min_tokens and len(self._stops))
        )

    def choose(self, logits: np.ndarray, best: int) -> int:
        """The next token.

        Args:
            logits: [V] float32, finite at the largest; left as they are.
            best: the token of the largest.

        Raises:
            UsageError: the guide cannot go on, or lets nothing through that the choice does.
        """
        if self._changes:
            logits = self._changed(logits)
            best = int(logits.argmax())
            if logits[best] == -np.inf:
                raise UsageError("no token is left to choose from", next_step="leave min_tokens out")
        return best if self._random is None else self._drawn(logits, float(logits[best]))

    def said(self, token: int) -> None:
        """Keep count of a token of the text."""
        self._said += 1
        if self._guide is not None:
            self._guide.said(token)
        if self._penalties:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._choice.repetition != 1 and token not in self._seen:
            self._seen = np.append(self._seen, token)

    def _changed(self, logits: np.ndarray) -> np.ndarray:
        choice, changed = self._choice, logits.copy()
        if choice.repetition != 1:
            some = changed[self._seen]
            factor = np.float32(choice.repetition)
            changed[self._seen] = np.where(some > 0, some / factor, some * factor)
        if self._counts:
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            tokens = np.fromiter(self._counts, np.int64, len(self._counts))
            changed[tokens] -= np.float32(choice.presence) + np.float32(choice.frequency) * counts
        changed[self._bias_ids] += self._biases
        if self._said < choice.min_tokens:
            changed[self._stops] = -np.inf
        if self._guide is not None:
            changed[~self._guide.allowed()] = -np.inf
        return changed

    def _drawn(self, logits: np.ndarray, largest: float) -> int:
        """A token as often as its probability says, those removed that are to be."""
        assert self._random is not None
        choice = self._choice
        temperature = max(choice.temperature, SMALLEST)
        if temperature < 1e-30 or choice.top_k == 1:  # in float32 nothing but the largest is left
            self._random.random()
            return int(logits.argmax())
        kept = _largest(logits, choice.top_k) if 0 < choice.top_k < len(logits) else None
        if kept is None and choice.top_p == 1 and choice.min_p == 0:
            return self._drawn_of_all(logits, largest, temperature)
        if kept is None:
            # What is left out here has, all together, less weight than the nucleus leaves out, or less than min_p each.
            least = 0.0 if choice.top_p == 1 else (1 - choice.top_p) / len(logits)
            least = max(least, choice.min_p)
            edge = np.float32(largest + temperature * np.log(least)) if least > 0 else np.float32(-np.inf)
            total = _weight(logits, largest, temperature) if choice.top_p < 1 else None
            kept = np.flatnonzero(logits >= np.nextafter(edge, np.float32(-np.inf)))
        else:
            total = None
        weights = np.exp((logits[kept].astype(np.float64) - largest) / temperature)
        if choice.top_p < 1:
            kept, weights = _nucleus(kept, weights, choice.top_p * (weights.sum() if total is None else total))
        if choice.min_p > 0:
            above = weights >= choice.min_p * weights.max()
            kept, weights = kept[above], weights[above]
        edges = np.cumsum(weights)
        place = int(np.searchsorted(edges, self._random.random() * edges[-1], side="right"))
        return int(kept[min(place, len(kept) - 1)])

    def _drawn_of_all(self, logits: np.ndarray, largest: float, temperature: float) -> int:
        assert self._random is not None
        weights = _weights(logits, largest, temperature)
        whole = len(weights) // BLOCK * BLOCK
        sums = weights[:whole].reshape(-1, BLOCK).sum(1, dtype=np.float32).astype(np.float64)
        edges = np.cumsum(np.append(sums, weights[whole:].sum(dtype=np.float64)))
        aim = self._random.random() * edges[-1]
        block = min(int(np.searchsorted(edges, aim, side="right")), len(edges) - 1)
        while not weights[block * BLOCK : (block + 1) * BLOCK].any():
            block -= 1  # the border of the last block that has any weight
        before = edges[block - 1] if block else 0.0
        inner = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
        place = int(np.searchsorted(inner, min(aim - before, np.nextafter(inner[-1], 0)), side="right"))
        return block * BLOCK + place


def _weights(logits: np.ndarray, largest: float, temperature: float) -> np.ndarray:
    """Of each token in float32, 1 of the likeliest."""
    scaled = logits - np.float32(largest)
    scaled *= np.float32(1 / temperature)
    weights: np.ndarray = np.exp(scaled, out=scaled)
    return weights


def _weight(logits: np.ndarray, largest: float, temperature: float) -> float:
    """Of all tokens together."""
    weights = _weights(logits, largest, temperature)
    whole = len(weights) // BLOCK * BLOCK
    blocks = weights[:whole].reshape(-1, BLOCK).sum(1)
    return float(blocks.sum(dtype=np.float64) + weights[whole:].sum(dtype=np.float64))


def _largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Ids of the largest, and of those equal to the last of them, in their order."""
    whole = len(logits) // BLOCK * BLOCK
    maxima = logits[:whole].reshape(-1, BLOCK).max(1) if whole else logits
    if count <= len(maxima) // 2:  # as many blocks have a maximum as large: the border is there or above
        logits_above = logits >= np.partition(maxima, -count)[-count]
        some = np.flatnonzero(logits_above)
    else:
        some = np.arange(len(logits))
    values = logits[some]
    return np.asarray(some[values >= np.partition(values, -count)[-count]])


def _nucleus(tokens: np.ndarray, weights: np.ndarray, aim: float) -> tuple[np.ndarray, np.ndarray]:
    """The fewest tokens that weigh so much together, of equal ones those with smaller ids; in their order."""
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order])
    kept = np.sort(order[: 1 + int(np.searchsorted(before, aim, side="left"))])
    return tokens[kept], weights[kept]
