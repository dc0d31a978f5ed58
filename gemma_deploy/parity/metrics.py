"""How far two sets of logits are apart: every number, always; which of them decide is the business of `gates.py`.

One position is looked at a time, so a vocabulary of 262,144 costs a few megabytes however many positions there are.
NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """Differences of test logits from reference logits; NaN where nothing finite was compared.

    Attributes:
        positions: how many positions were compared.
        max_abs: largest absolute difference of two logits.
        mean_abs: mean absolute difference.
        max_abs_logit: largest absolute reference logit.
        relative: max_abs / max(1, max_abs_logit); the gate of fp32 and bf16 artifacts.
        cosine: smallest cosine of a position's two logit vectors.
        kl_mean: mean of KL(reference || test) over positions, in nats.
        kl_max: largest KL of a position.
        top1: share of positions whose arg max agrees.
        near_ties: disagreements whose reference margin (best logit minus second best) is below max_abs.
        disagreements: all positions whose arg max differs, near ties included.
        overturned: the largest reference margin among them; 0 where there are none.
        greedy_prefix: leading positions of every row that agree, the smallest over rows.
        scored: positions with a target token.
        ppl_reference: perplexity of the targets under the reference.
        ppl_test: the same under the test logits.
        ppl_delta: ppl_test / ppl_reference - 1.
        ppl_error: standard error of ppl_delta: a few dozen tokens say nothing about half a percent.
        bad_reference: inf and NaN among the reference logits.
        bad_test: inf and NaN among the test logits.
    """

    positions: int
    max_abs: float
    mean_abs: float
    max_abs_logit: float
    relative: float
    cosine: float
    kl_mean: float
    kl_max: float
    top1: float
    near_ties: int
    disagreements: int
    overturned: float
    greedy_prefix: int
    scored: int
    ppl_reference: float
    ppl_test: float
    ppl_delta: float
    ppl_error: float
    bad_reference: int
    bad_test: int

    def to_json(self) -> dict[str, float | int | None]:
        """Plain dict; NaN and inf become None, which JSON can hold."""
        return {k: (v if isinstance(v, int) or math.isfinite(v) else None) for k, v in asdict(self).items()}


def log_softmax(row: np.ndarray) -> np.ndarray:
    """row: [V] -> float64 [V]."""
    row = row.astype(np.float64)
    row -= row.max()
    return row - math.log(np.exp(row).sum())


def divergence(
    reference: np.ndarray, test: np.ndarray, difference: np.ndarray, *, largest: float
) -> tuple[float, float, float]:
    """Log of the sum of exponentials of both, and KL(reference || test) in nats.

    With p the softmax of the reference, d = reference - test and m its mean under p,
    KL = log sum p exp(m - d) = log1p(sum p expm1(m - d)): float32 keeps its relative precision there, down to KL of
    1e-12, which the difference of two logarithms would lose. Ten times faster than float64 throughout.
    """
    if largest > 20:  # exp(m - d) could overflow float32
        log_ref, log_test = log_softmax(reference), log_softmax(test)
        kl = max(0.0, float(np.exp(log_ref) @ (log_ref - log_test)))
        return float(reference[0] - log_ref[0]), float(test[0] - log_test[0]), kl
    top = reference.max()
    p = np.exp(reference - top)
    total = float(p.sum(dtype=np.float64))
    p /= np.float32(total)
    mean = float(p @ difference)
    kl = max(0.0, math.log1p(float(p @ np.expm1(np.float32(mean) - difference))))
    log_sum = float(top) + math.log(total)
    return log_sum, log_sum - mean + kl, kl


class Comparison:
    """Accumulates `Metrics` position by position.

    Positions of one row must come in order; rows may be interleaved, `row` tells them apart.
    """

    def __init__(self) -> None:
        self._count = self._values = self._bad_ref = self._bad_test = 0
        self._max_abs = self._max_logit = self._sum_abs = 0.0
        self._cosines: list[float] = []
        self._kl: list[float] = []
        self._nll: list[tuple[float, float]] = []
        self._margins: list[float] = []
        self._prefix: dict[int, int] = {}
        self._broken: set[int] = set()

    def add(self, reference: np.ndarray, test: np.ndarray, target: int | None = None, *, row: int = 0) -> None:
        """Compare one position.

        Args:
            reference: [V] float32 logits.
            test: [V] float32 logits.
            target: the token that really came next, or None.
            row: which sequence the position belongs to.
        """
        if reference.shape != test.shape:
            raise ValueError(f"logits of {test.shape} cannot be compared with a reference of {reference.shape}")
        self._count += 1
        self._prefix.setdefault(row, 0)
        bad_ref = int(reference.size - np.isfinite(reference).sum())
        bad_test = int(test.size - np.isfinite(test).sum())
        self._bad_ref += bad_ref
        self._bad_test += bad_test
        if bad_ref or bad_test:  # nothing else means anything here; the gates refuse such a position by its count
            self._broken.add(row)
            return
        difference = reference - test
        absolute = np.abs(difference)
        self._max_abs = max(self._max_abs, float(absolute.max()))
        self._sum_abs += float(absolute.sum(dtype=np.float64))
        self._values += reference.size
        self._max_logit = max(self._max_logit, float(np.abs(reference).max()))
        norms = float(np.linalg.norm(reference) * np.linalg.norm(test))
        self._cosines.append(float(reference @ test) / norms if norms else float(np.array_equal(reference, test)))
        log_sum, log_sum_test, kl = divergence(reference, test, difference, largest=float(absolute.max()))
        self._kl.append(kl)
        if target is not None:
            self._nll.append((log_sum - float(reference[target]), log_sum_test - float(test[target])))
        self._compare_top1(reference, test, row)

    def _compare_top1(self, ref: np.ndarray, tst: np.ndarray, row: int) -> None:
        best = int(ref.argmax())
        if best == int(tst.argmax()):
            if row not in self._broken:
                self._prefix[row] += 1
            return
        self._broken.add(row)
        second = np.partition(ref, -2)[-2]
        self._margins.append(float(ref[best] - second))

    def likelihoods(self) -> np.ndarray:
        """[scored, 2] float64: negative log likelihood of each target in nats, under reference and test."""
        return np.array(self._nll, dtype=np.float64).reshape(-1, 2)

    def result(self) -> Metrics:
        """The metrics of everything added so far."""
        good, nan = len(self._kl), float("nan")
        max_abs = self._max_abs if good else nan
        nll = self.likelihoods()
        ppl_ref, ppl_test = (_perplexity(nll[:, i]) for i in range(2))
        return Metrics(
            positions=self._count,
            max_abs=max_abs,
            mean_abs=self._sum_abs / self._values if good else nan,
            max_abs_logit=self._max_logit if good else nan,
            relative=max_abs / max(1.0, self._max_logit),
            cosine=min(self._cosines, default=nan),
            kl_mean=float(np.mean(self._kl)) if good else nan,
            kl_max=max(self._kl, default=nan),
            top1=1.0 - len(self._margins) / good if good else nan,
            near_ties=sum(margin < max_abs for margin in self._margins),
            disagreements=len(self._margins),
            overturned=max(self._margins, default=0.0),
            greedy_prefix=min(self._prefix.values(), default=0),
            scored=len(nll),
            ppl_reference=ppl_ref,
            ppl_test=ppl_test,
            ppl_delta=ppl_test / ppl_ref - 1.0 if len(nll) else nan,
            ppl_error=float(np.std(nll[:, 1] - nll[:, 0], ddof=1) / math.sqrt(len(nll))) if len(nll) > 1 else nan,
            bad_reference=self._bad_ref,
            bad_test=self._bad_test,
        )


def _perplexity(nll: np.ndarray) -> float:
    """nll: [n] negative log likelihoods in nats."""
    if not len(nll):
        return float("nan")
    mean = float(nll.mean())
    return math.exp(mean) if mean < 700 else float("inf")


def compare_logits(reference: np.ndarray, test: np.ndarray, targets: Iterable[int] | None = None) -> Metrics:
    """Metrics of two arrays.

    Args:
        reference: [positions, V].
        test: [positions, V].
        targets: the next token of every position, or None.
    """
    if reference.shape != test.shape:
        raise ValueError(f"logits of {test.shape} cannot be compared with a reference of {reference.shape}")
    comparison = Comparison()
    wanted = list(targets) if targets is not None else [None] * len(reference)
    for ref, tst, target in zip(reference, test, wanted, strict=True):
        comparison.add(ref, tst, target)
    return comparison.result()
