"""Chooses the next token: greedy, or temperature, then top-k, then top-p, as transformers' `generate` does.

Pure NumPy. A seed gives the same tokens on every machine that gives the same logits; ties go to the lower token id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_deploy.errors import DeployError, UsageError

SMALLEST = 1e-260  # a temperature by which any float32 can be divided in float64


@dataclass(frozen=True)
class Largest:
    """The largest logits of a token, in the place of all: what is greedy, or top-k, asks for no others.

    Args:
        ids: [n] int32, the token of the largest logit first, of equals the lower id; logits: [n] float32, theirs.
        log_sum: the logarithm of the sum of exp over all logits, finite.
    """

    ids: np.ndarray
    logits: np.ndarray
    log_sum: float


Row = np.ndarray | Largest  # logits of one token: [V] float32, or as far as they are asked for
Rows = np.ndarray | list[Largest]  # of several


@dataclass(frozen=True)
class Chances:
    """What a token is drawn from: how often each comes.

    Args:
        ids: [n] tokens, each larger than the one before; None: all that there are.
        weights: [n] float64, 0 or more.
    """

    ids: np.ndarray | None
    weights: np.ndarray

    def of(self, token: int) -> float:
        """The weight of a token."""
        if self.ids is None:
            return float(self.weights[token])
        place = int(np.searchsorted(self.ids, token))
        return float(self.weights[place]) if place < len(self.ids) and self.ids[place] == token else 0.0

    def less(self, other: Chances) -> Chances:
        """What is left of each weight when another's is taken away; where nothing is left, 0."""
        if self.ids is None and other.ids is None:
            return Chances(None, np.maximum(self.weights - other.weights, 0))
        if self.ids is None:
            left = self.weights.copy()
            left[other.ids] = np.maximum(left[other.ids] - other.weights, 0)
            return Chances(None, left)
        others = np.array([other.of(int(token)) for token in self.ids])
        return Chances(self.ids, np.maximum(self.weights - others, 0))


def certain(token: int) -> Chances:
    """Of a token that is no other."""
    return Chances(np.array([token]), np.ones(1))


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, whoever chooses them.

    Args:
        temperature: 0 is greedy; 1 leaves the distribution as it is.
        top_k: keep the k most probable tokens, and those equal to the last of them; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities sum to at least p; 1 keeps all.
        seed: of the random stream; None for one from the operating system.

    Raises:
        UsageError: a value outside its range (all at once).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature {self.temperature}: 0 (greedy) or more")
        if self.top_k < 0:
            problems.append(f"top_k {self.top_k}: 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p {self.top_p}: above 0, up to 1 (all tokens)")
        if self.seed is not None and self.seed < 0:
            problems.append(f"seed {self.seed}: 0 or more")
        if problems:
            raise UsageError(
                "sampling cannot be done like this", problems=problems, next_step="give values of these ranges"
            )

    def sampler(self) -> Sampler:
        """A new sampler with these settings."""
        return Sampler(self.temperature, self.top_k, self.top_p, seed=self.seed)


class Sampler:
    """One random stream for a generation; the arguments of `Sampling`."""

    def __init__(
        self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, *, seed: int | None = None
    ) -> None:
        Sampling(temperature, top_k, top_p, seed)  # checks them
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed)

    @property
    def top(self) -> int:
        """How many of the largest logits are enough to choose by, with the equals of the last; 0: all are needed."""
        return 1 if self.temperature == 0 else self.top_k

    def __call__(self, logits: np.ndarray) -> list[int]:
        """Choose one token per row.

        Args:
            logits: [B, V] float32.

        Returns:
            [B] token ids.

        Raises:
            DeployError: logits are NaN or all infinite: the graph has overflowed.
        """
        _check_finite(logits)
        if self.temperature == 0:
            return [int(token) for token in logits.argmax(axis=-1)]
        return [self.draw(Chances(None, _softmax(row))) for row in self.filtered(logits)]

    def choose(self, row: Row) -> int:
        """A token: of the logits of one, all of them or the `top` largest.

        Raises:
            DeployError: see `__call__`.
        """
        if not isinstance(row, Largest):
            return self(row[None])[0]
        return int(row.ids[0]) if self.temperature == 0 else self.draw(self.chances(row))

    def chances(self, row: Row) -> Chances:
        """What a token is drawn from where the temperature is not 0; their sum is 1.

        Raises:
            DeployError: see `__call__`.
        """
        if isinstance(row, Largest):
            return self._chances_of_largest(row)
        _check_finite(row)
        return Chances(None, _softmax(self.filtered(row[None])[0]))

    def _chances_of_largest(self, row: Largest) -> Chances:
        """As `filtered` and `_softmax` give, of the tokens that are kept alone."""
        scores = self._scores(row.logits)
        if self.top_k < len(scores):
            scores = scores[scores >= scores[self.top_k - 1]]
        if self.top_p < 1:
            scores = scores[: _nucleus(_softmax(scores), self.top_p)]
        ids = row.ids[: len(scores)]
        order = np.argsort(ids)  # edges of `draw` are in the order of tokens
        return Chances(ids[order], _softmax(scores)[order])

    def draw(self, chances: Chances) -> int:
        """A token id, each as often as its weight says, which are not all 0."""
        edges = np.cumsum(chances.weights)
        # The last edge may be a hair below 1 and tokens of probability 0 have edges of zero width: never drawn.
        place = int(np.searchsorted(edges, self._random.random() * edges[-1], side="right"))
        return place if chances.ids is None else int(chances.ids[place])

    def happens(self, probability: float) -> bool:
        """Whether something of this probability comes about; always where it is 1 or more."""
        return bool(self._random.random() < probability)

    def filtered(self, logits: np.ndarray) -> np.ndarray:
        """Logits with temperature, top-k and top-p applied, removed tokens at -inf. [B, V] -> [B, V] float64.

        Below `SMALLEST` they are given less the largest of their row, which changes no probability.
        """
        scores = self._scores(logits)
        if 0 < self.top_k < scores.shape[-1]:
            last_kept = np.partition(scores, -self.top_k, axis=-1)[:, -self.top_k, None]
            scores = np.where(scores < last_kept, -np.inf, scores)
        if self.top_p < 1:
            for row in scores:
                row[_outside_nucleus(row, self.top_p)] = -np.inf
        return scores

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        """Logits with temperature applied. [..., n] -> [..., n] float64."""
        scores: np.ndarray = logits.astype(np.float64)
        if 0 < self.temperature < SMALLEST:  # all but the largest would overflow, and it too
            with np.errstate(over="ignore"):
                return (scores - scores.max(axis=-1, keepdims=True)) / self.temperature
        scores /= self.temperature or 1.0
        return scores


def _check_finite(logits: np.ndarray) -> None:
    top = logits.max(axis=-1)
    if not np.isfinite(top).all():
        raise DeployError(
            f"the model gave {np.ravel(top)[~np.isfinite(np.ravel(top))][0]} as its largest logit",
            next_step="run `gemma-deploy parity` on the artifact; fp16 overflows are listed there",
        )


def _outside_nucleus(scores: np.ndarray, top_p: float) -> np.ndarray:
    """Token ids to remove: those before which the more probable ones already reach p. scores: [V]."""
    order = np.argsort(-scores, kind="stable")
    return np.asarray(order[_nucleus(_softmax(scores)[order], top_p) :])


def _nucleus(probabilities: np.ndarray, top_p: float) -> int:
    """How many tokens are kept of these, the most probable first: the fewest that reach p."""
    return 1 + int(np.searchsorted(np.cumsum(probabilities), top_p, side="left"))


def _softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max())
    return exp / exp.sum()
