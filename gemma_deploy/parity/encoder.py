"""What is measured of an encoder: hidden states behind the last norm, and the vectors that are made of them.

Texts of several lengths lie in one batch, so that padding is part of what is compared; the longest outgrow the window.
The reference's vectors are made from its hidden states in float64, of the real tokens alone: padding, order of the
dense layers and lengths are the graph's own business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gemma_deploy.checkpoint import Checkpoint, WeightSource
from gemma_deploy.checkpoint.sentence import SentenceHead, pooled
from gemma_deploy.parity.cases import Case, prompt_length
from gemma_deploy.parity.compare import text_tokens
from gemma_deploy.parity.gates import Line
from gemma_deploy.text import Tokenizer, has_tokenizer

STATES, DISTANCE, LENGTH = "relative error", "largest cosine distance", "largest error of a length"
# Of hidden states, relative to the largest: float32 in another order of sums. Tiny models up to 2.0e-6. Real weights of
# the 270M (which were not trained to be read in both directions): 2.0e-5 at 700 tokens, where at 576 transformers in
# float32 is 7.5e-6 from float64, the graph 4.8e-6, and the two 1.2e-5 apart. Every break of the tests is above 1e-3.
EXACT = 5e-5
# 1 - cosine to transformers in float32, of the worst text, those of one token and of random tokens among them. The same
# weights with random dense layers, 700 tokens, both targets: fp32 2.8e-12, fp16 3.7e-6, w8a16 0.0026 and 0.0044,
# w8a16_gptq 0.0009, w4a16_gptq 0.041; two to four times that. bfloat16 rounds less coarsely than int8.
DISTANCES = {
    "fp32": 1e-9, "bf16": 2e-3, "fp16": 2e-5, "w8a16": 0.01, "w8a16_gptq": 0.004, "w4a16_rtn": 0.2,
    "w4a16": 0.15, "w4a16_gptq": 0.1,
}  # fmt: skip
UNIT = 1e-5
SHARES = (1.0, 0.6, 0.1, 0.0)  # lengths of the texts of a case, as shares of the longest; the last has one token
Vectors = list[np.ndarray]  # of each case, [texts, dimensions]


class StateSource(Protocol):
    """What gives hidden states: `reference.TorchSource`."""

    def run(self, cases: Sequence[Case]) -> list[list[np.ndarray]]:
        """[tokens, hidden] of every text of every case."""


@dataclass(frozen=True)
class Run:
    """What one model gives.

    Args:
        states: of every text of every case, [tokens, hidden]; vectors: of every case.
    """

    states: list[list[np.ndarray]]
    vectors: Vectors


def text_cases(checkpoint: Checkpoint, longest: int, text: str | None, *, asked: int, notes: list[str]) -> list[Case]:
    """A case of real text, where there is a tokenizer, and one of random tokens; both framed as texts are.

    Args:
        longest: tokens that the graph takes; asked: `parity.prompt_tokens`; text: a file, None for the bundled sample.
    """
    config = checkpoint.config
    length, sentence = prompt_length(config, longest, asked)
    notes += [sentence] if sentence else []
    lengths = [max(1, int(share * length)) for share in SHARES]
    tokens = text_tokens(checkpoint, text, sum(lengths), notes=notes)
    front, back = Tokenizer.of(checkpoint).frame if has_tokenizer(checkpoint) else ((config.bos_token_id or 0,), ())
    drawn = np.random.default_rng(0).integers(0, config.vocab_size, sum(lengths)).tolist()
    cases = []
    for name, ids in (("text", tokens), ("random", drawn)):
        if ids is None or not len(ids):
            continue
        rows, at = [], 0
        for wanted in lengths:
            inside = max(0, wanted - len(front) - len(back))
            rows.append((*front, *ids[at : at + inside], *back)[:wanted] or (0,))
            at = (at + inside) % max(1, len(ids) - inside)
        cases.append(Case(name, tuple(rows), ((),) * len(rows)))
    return cases


def reference_run(source: StateSource, weights: WeightSource, cases: Sequence[Case]) -> Run:
    """Hidden states of a model in torch, and their vectors in float64.

    Args:
        weights: of the dense layers.
    """
    states = source.run(cases)
    head, matrices = dense_of(weights)
    return Run(states, [_vectors(case, head, matrices) for case in states])


def dense_of(weights: WeightSource) -> tuple[SentenceHead, dict[str, np.ndarray]]:
    """What stands behind an encoder, and its matrices."""
    head = weights.config.sentence
    assert head is not None  # what opens an encoder has read it
    return head, {name: weights.rows(name, 0, shape[0]) for name, shape in head.tensors().items()}


def _vectors(states: Sequence[np.ndarray], head: SentenceHead, matrices: Mapping[str, np.ndarray]) -> np.ndarray:
    each = [pooled(one[None], np.ones((1, len(one))), head, weights=matrices)[0] for one in states]
    return np.stack(each)


def own_vectors(run: Run, weights: WeightSource) -> Vectors:
    """The vectors that a graph's own hidden states should give, in float64."""
    head, matrices = dense_of(weights)
    return [_vectors(case, head, matrices) for case in run.states]


def measure(pair: tuple[str, str], runs: Mapping[str, Run], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Every figure of a pair, a row for each case; keys of logits are None."""
    reference, test = (runs[name] for name in pair)
    rows = []
    for number, case in enumerate(cases):
        row: dict[str, Any] = {"reference": pair[0], "test": pair[1], "case": case.name, "phase": "texts"}
        row |= dict.fromkeys(("kl_mean", "top1", "greedy_prefix", "ppl_delta"))
        row["positions"] = sum(map(len, case.prompts))
        row["relative"] = _finite(relative_error(reference.states[number], test.states[number]))
        row["cosine_distance"] = _finite(cosine_distance(reference.vectors[number], test.vectors[number]))
        rows.append(row)
    return rows


def relative_error(reference: Sequence[np.ndarray], test: Sequence[np.ndarray]) -> float:
    """Largest difference of hidden states, relative to the largest of them; infinite where one is no number."""
    largest = max(float(np.abs(one).max()) for one in reference)
    found = max(float(np.abs(one - other).max()) for one, other in zip(reference, test, strict=True))
    return found / max(1.0, largest) if math.isfinite(found) else math.inf


def cosine_distance(reference: np.ndarray, test: np.ndarray) -> float:
    """1 - cosine of the two vectors of a text, the largest of all texts; infinite where one is no number."""
    one, other = reference.astype(np.float64), test.astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    cosines = (one * other).sum(-1) / np.where(lengths > 0, lengths, np.nan)
    found = float(np.max(1 - cosines))
    return max(0.0, found) if math.isfinite(found) else math.inf


def length_error(vectors: Sequence[np.ndarray]) -> float:
    """How far from 1 a vector's length is, at most."""
    return max(float(np.abs(np.linalg.norm(one.astype(np.float64), axis=-1) - 1).max()) for one in vectors)


def worst(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """The largest figure of the rows; infinite where one is no number."""
    return max((math.inf if row[key] is None else float(row[key]) for row in rows), default=math.inf)


def line(what: str, name: str, value: float, *, limit: float) -> Line:
    """A line of the gate."""
    return Line(what, name, value, limit, value <= limit)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
