"""Sampling against transformers' own filters, against plain NumPy, and at its edges."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.runtime import Sampler
from gemma_deploy.runtime.sampling import Chances, Largest, certain


@pytest.fixture
def logits():
    return (np.random.default_rng(0).standard_normal((3, 300)) * 3).astype(np.float32)


def softmax(row):
    exp = np.exp(row - row.max())
    return exp / exp.sum()


def kept(scores):
    return [set(np.flatnonzero(np.isfinite(row))) for row in scores]


def test_greedy_takes_the_largest_and_the_lower_id_of_equals(logits):
    assert Sampler()(logits) == logits.argmax(-1).tolist()
    assert Sampler()(np.array([[1, 5, 5, 2]], np.float32)) == [1]
    assert all(type(token) is int for token in Sampler()(logits))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, 0, 1), (0.7, 0, 1), (3, 0, 1), (1, 5, 1), (1, 299, 1), (1, 0, 0.9), (1, 0, 0.2), (0.6, 40, 0.95), (2, 3, 0.5)],
)
def test_filters_equal_those_of_transformers(logits, temperature, top_k, top_p):
    scores = torch.tensor(logits, dtype=torch.float64)
    for warper in (
        TemperatureLogitsWarper(float(temperature)),
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
    ):
        scores = warper(None, scores) if warper else scores
    got = Sampler(temperature, top_k, top_p).filtered(logits)
    assert kept(got) == kept(scores.numpy())
    np.testing.assert_allclose(got, scores.numpy(), rtol=1e-15)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-270, 1e-260, 1e-40])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1), (2, 1), (0, 0.9), (3, 5e-324), (10**30, 0.5)])
def test_the_smallest_temperatures_leave_the_largest_alone_to_choose(logits, temperature, top_k, top_p):
    """The limit of the distribution: of equals each as often."""
    large = np.concatenate([logits, [[*[-3e38] * 298, 3.3e38, 3.3e38]], np.full((1, 300), -np.inf)]).astype(np.float32)
    large[-1, 7] = -1e30
    sampler = Sampler(temperature, top_k, top_p, seed=1)
    assert sampler(large)[:3] == logits.argmax(-1).tolist()
    drawn = [sampler(large)[3:] for _ in range(40)]
    assert {row[1] for row in drawn} == {7}
    assert {row[0] for row in drawn} == ({298, 299} if top_p == 1 else {298} if top_p <= 0.5 else {298, 299})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e30, 1e300, 1.7e308])
def test_the_largest_temperatures_leave_all_alike(logits, temperature):
    scores = Sampler(temperature).filtered(logits)
    assert np.abs(scores).max() < 1e-25
    assert len({Sampler(temperature, seed=seed)(logits)[0] for seed in range(20)}) > 15


def test_top_k_keeps_the_k_largest_and_their_equals():
    row = np.array([[0, 3, 1, 2, 2, -1]], np.float32)
    assert kept(Sampler(1, 1).filtered(row)) == [{1}]
    assert kept(Sampler(1, 2).filtered(row)) == [{1, 3, 4}]
    assert kept(Sampler(1, 6).filtered(row)) == kept(Sampler(1, 100).filtered(row)) == [set(range(6))]


def test_top_p_keeps_the_fewest_that_reach_p():
    row = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float64))
    sets = {p: kept(Sampler(1, 0, p).filtered(row))[0] for p in (1e-9, 0.49, 0.51, 0.76, 0.9, 1)}
    # exactly p is enough, and of equals the lower id stays
    assert kept(Sampler(1, 0, 0.5).filtered(np.zeros((1, 2)))) == [{0}]
    assert sets == {1e-9: {0}, 0.49: {0}, 0.51: {0, 1}, 0.76: {0, 1, 2}, 0.9: {0, 1, 2, 3}, 1: {0, 1, 2, 3}}


def test_top_p_counts_what_top_k_has_left():
    row = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float64))
    # of the two left, 0.4 / 0.7 = 0.57 is enough for 0.5; of all four it is not
    assert kept(Sampler(1, 2, 0.5).filtered(row)) == [{0}]
    assert kept(Sampler(1, 0, 0.5).filtered(row)) == [{0, 1}]


def test_tokens_come_as_often_as_they_are_probable(logits):
    row, draws = logits[:1, :8], 20000
    sampler = Sampler(1.5, 6, 0.95, seed=1)
    counts = np.bincount([sampler(row)[0] for _ in range(draws)], minlength=8)
    expected = draws * softmax(sampler.filtered(row)[0])
    assert (counts[expected == 0] == 0).all()
    used = expected > 0
    assert 1 < used.sum() < 8
    # each count is binomial: five standard deviations, with a fixed seed
    assert (np.abs(counts - expected)[used] < 5 * np.sqrt(expected[used])).all()


def test_draws_are_those_of_numpys_generator(logits):
    sampler, uniform = Sampler(1.0, seed=42), np.random.default_rng(42)
    for _ in range(50):
        edges = [np.cumsum(softmax(row.astype(np.float64))) for row in logits]
        assert sampler(logits) == [int(np.flatnonzero(row > uniform.random())[0]) for row in edges]


def test_a_seed_repeats_and_no_seed_does_not(logits):
    def drawn(seed):
        sampler = Sampler(1.0, seed=seed)
        return [sampler(logits) for _ in range(20)]

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)


def test_tokens_at_minus_infinity_are_never_drawn():
    row = np.full((1, 6), -np.inf, np.float32)
    row[0, [2, 4]] = 0
    sampler = Sampler(1.0, seed=0)
    assert {sampler(row)[0] for _ in range(200)} == {2, 4}
    assert Sampler(1.0, 1, 0.01, seed=0)(np.array([[-np.inf, 0.0]], np.float32)) == [1]


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.4999, 1), (0.5, 3), (np.nextafter(1, 0), 3)])
def test_border_draws_land_on_probable_tokens(number, token):
    class Fixed:
        def random(self):
            return number

    sampler = Sampler(1.0)
    sampler._random = Fixed()
    assert sampler(np.array([[-np.inf, 0, -np.inf, 0, -np.inf]], np.float32)) == [token]


def test_a_very_low_temperature_is_greedy(logits):
    assert Sampler(1e-6, seed=3)(logits) == logits.argmax(-1).tolist()


def test_one_token_vocabulary_and_extreme_logits():
    assert Sampler(1.0, 5, 0.5, seed=0)(np.array([[3.0]], np.float32)) == [0]
    assert Sampler(1.0, seed=0)(np.array([[1e30, -1e30, 0]], np.float32)) == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_overflowed_logits_are_an_error_not_a_token(bad):
    with pytest.raises(DeployError, match=f"the model gave {bad} as its largest logit"):
        Sampler()(np.array([[0.0, bad]], np.float32))
    with pytest.raises(DeployError, match="the model gave -inf"):
        Sampler(1.0)(np.full((1, 4), -np.inf, np.float32))


def test_every_bad_setting_is_named_at_once():
    with pytest.raises(UsageError) as caught:
        Sampler(-1, -2, 0, seed=-3)
    assert str(caught.value).splitlines() == [
        "sampling cannot be done like this",
        "  - temperature -1: 0 (greedy) or more",
        "  - top_k -2: 0 (all tokens) or more",
        "  - top_p 0: above 0, up to 1 (all tokens)",
        "  - seed -3: 0 or more",
        "  next: give values of these ranges",
    ]
    for temperature, top_p in ((np.nan, 1), (np.inf, 1), (1, 1.5), (1, np.nan)):
        with pytest.raises(UsageError):
            Sampler(temperature, 0, top_p)


def largest(row, count):
    order = np.argsort(-row, kind="stable")[:count]
    return Largest(order.astype(np.int32), row[order], 0.0)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0, 0, 1), (0, 7, 0.3), (1, 1, 1), (0.7, 5, 1), (3, 40, 0.95), (1, 40, 0.3), (1e-300, 3, 0.9), (1e300, 9, 1)],
)
def test_the_largest_logits_choose_as_all_do(logits, temperature, top_k, top_p):
    """The same tokens from the same random stream; five logits more than are kept, as equals may come behind them."""
    whole, short = (Sampler(temperature, top_k, top_p, seed=5) for _ in range(2))
    assert short.top == (1 if temperature == 0 else top_k)
    for _ in range(100):
        for row in logits:
            assert short.choose(largest(row, short.top + 5)) == whole.choose(row)
    if temperature == 0:
        return
    kept, expected = short.chances(largest(logits[0], top_k + 5)), whole.chances(logits[0])
    assert expected.ids is None
    assert list(kept.ids) == np.flatnonzero(expected.weights).tolist()
    np.testing.assert_allclose(kept.weights, expected.weights[kept.ids], rtol=1e-13)


def test_equals_of_the_last_of_the_top_are_kept():
    row = np.array([0, 3, 1, 2, 2, -1], np.float32)
    assert Sampler(1, 2).chances(largest(row, 5)).ids.tolist() == [1, 3, 4]


def test_chances_of_some_tokens_are_those_of_all_with_zeros():
    own, other = np.array([0.5, 0, 0.3, 0, 0.2]), np.array([0, 0.1, 0.4, 0.5, 0])
    for first in (Chances(None, own), Chances(np.array([0, 2, 4]), own[[0, 2, 4]])):
        for second in (Chances(None, other), Chances(np.array([1, 2, 3]), other[[1, 2, 3]])):
            left = first.less(second)
            np.testing.assert_allclose([left.of(token) for token in range(5)], [0.5, 0, 0, 0, 0.2])
            assert [first.of(token) for token in range(5)] == own.tolist()
    assert [certain(3).of(token) for token in range(5)] == [0, 0, 0, 1, 0]
    drawn = {Sampler(1, seed=seed).draw(Chances(np.array([7, 9]), np.array([1.0, 3.0]))) for seed in range(30)}
    assert drawn == {7, 9}
