"""Tokens that requests get: those of `Sampler` for the same seed, and penalties against sums by hand."""

import numpy as np
import pytest

from gemma_deploy.errors import UsageError
from gemma_deploy.runtime.sampling import Sampler
from gemma_deploy.serve.choosing import Choice, Chooser

V = 2_000  # not a multiple of a block


def logits_of(seed, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(V) * scale).astype(np.float32)


def chosen(choice, row, count=1, prompt=(1,), stops=()):
    chooser = Chooser(choice, prompt, stops)
    tokens = []
    for _ in range(count):
        tokens.append(chooser.choose(row, int(row.argmax())))
        chooser.said(tokens[-1])
    return tokens


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.3, 0, 1.0), (2.0, 0, 0.9), (1.0, 0, 0.999), (1.0, 5, 1.0), (1.5, 700, 0.8), (0.7, 1, 1.0),
     (1e-40, 0, 0.9), (5.0, 64, 0.95)],
)  # fmt: skip
def test_a_seed_gives_the_tokens_of_the_projects_sampler(temperature, top_k, top_p):
    """But where float32 and float64 round a border differently, 1 of 400; nothing is off by more than 1e-6."""
    row = logits_of(3)
    before = row.copy()
    sampler = Sampler(temperature, top_k, top_p, seed=11)
    tokens = chosen(Choice(temperature, top_k, top_p, seed=11), row, 400)
    weights = sampler.chances(row).weights
    edges, aims = np.cumsum(weights), np.random.default_rng(11).random(400)
    assert (weights[tokens] > 0).all()
    assert ((edges - weights)[tokens] - 1e-6 < aims).all()
    assert (aims < edges[tokens] + 1e-6).all()
    assert np.count_nonzero(np.array([sampler(row[None])[0] for _ in range(400)]) != tokens) <= 2
    assert len(set(tokens)) > 1 or top_k == 1 or temperature < 1e-30
    np.testing.assert_array_equal(row, before)


def test_logits_that_are_equal_at_the_border_of_top_k_are_all_kept():
    row = np.full(V, -5, np.float32)
    row[[7, 900, 1500]] = 2
    assert set(chosen(Choice(1.0, 2, seed=1), row, 200)) == {7, 900, 1500}


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    row = logits_of(4)
    scaled = np.exp((row.astype(np.float64) - row.max()) / 2)
    tokens = set(chosen(Choice(2.0, min_p=0.05, seed=5), row, 3_000))
    assert tokens <= set(np.flatnonzero(scaled >= 0.05).tolist())
    assert len(tokens) > 0.9 * np.count_nonzero(scaled >= 0.05)


def test_what_is_drawn_of_all_is_distributed_as_the_model_says():
    row = np.full(V, -np.inf, np.float32)
    row[[0, 511, 512, 1999]] = np.log([1, 2, 3, 4])
    counts = np.bincount(chosen(Choice(1.0, seed=2), row, 20_000), minlength=V)
    np.testing.assert_allclose(counts[[0, 511, 512, 1999]] / 20_000, [0.1, 0.2, 0.3, 0.4], atol=0.012)  # 3.5 sigma
    assert counts.sum() == counts[[0, 511, 512, 1999]].sum()


def test_penalties_bias_and_least_length_by_hand():
    row = np.array([4.0, 3.9, -1.0, 1.0, 3.95, 0.0], np.float32)
    greedy = {"prompt": (0, 2), "stops": (4,)}
    # 0 is of the prompt: 4 / 2; 4 is a stop token; then 1 is said: 3.9 / 2
    assert chosen(Choice(repetition=2.0, min_tokens=9), row, 3, **greedy) == [1, 0, 0]
    assert chosen(Choice(repetition=2.0), row, 1, **greedy) == [4]
    assert chosen(Choice(presence=0.2), row, 4, **greedy) == [0, 4, 1, 0]
    # twice said costs twice: 0 (4.0), 4 (3.95), 0 again at 3.9 before 1, 1 (3.9), then 4 at 3.85
    assert chosen(Choice(frequency=0.1), row, 5, **greedy) == [0, 4, 0, 1, 4]
    assert chosen(Choice(bias={5: 100.0, 0: -100.0}), row, 1, **greedy) == [5]
    assert chosen(Choice(bias={3: 2.96}), row, 2, **greedy) == [0, 0]
    assert chosen(Choice(min_tokens=2, bias={4: 5.0}), row, 3, **greedy) == [0, 0, 4]


def test_everything_out_of_range_is_told_at_once():
    wrong = Choice(
        -1.0, -1, 0.0, -3, min_p=2.0, repetition=0.0, presence=np.nan, min_tokens=-1, bias={V: 1.0, 3: np.inf}
    )
    with pytest.raises(UsageError) as caught:
        wrong.check(V)
    assert len(caught.value.problems) == 10
