"""Every measure against a formula written down again here in double precision."""

import json
import math

import numpy as np
import pytest

from gemma_deploy.parity.metrics import Comparison, compare_logits, log_softmax

N, V = 40, 96


@pytest.fixture
def logits():
    rng = np.random.default_rng(3)
    reference = (rng.standard_normal((N, V)) * 4).astype(np.float32)
    test = reference + (rng.standard_normal((N, V)) * 0.3).astype(np.float32)
    return reference, test, rng.integers(0, V, N)


def probabilities(rows):
    """[n, V] in double precision, the textbook way."""
    powers = np.exp(rows.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


def test_every_measure_equals_its_formula(logits):
    reference, test, targets = logits
    p, q = probabilities(reference), probabilities(test)
    difference = np.abs(reference.astype(np.float64) - test)
    kl = (p * np.log(p / q)).sum(axis=1)
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(test, axis=1)
    agree = reference.argmax(axis=1) == test.argmax(axis=1)
    margins = np.diff(np.sort(reference, axis=1)[:, -2:], axis=1)[~agree, 0]
    nll_p, nll_q = (-np.log(x[np.arange(N), targets]) for x in (p, q))
    got = compare_logits(reference, test, targets)
    assert 0 < (~agree).sum() < N  # or half of what follows would be empty
    expected = {
        "max_abs": difference.max(),
        "mean_abs": difference.mean(),
        "max_abs_logit": np.abs(reference).max(),
        "relative": difference.max() / np.abs(reference).max(),
        "cosine": ((reference.astype(np.float64) * test).sum(axis=1) / norms).min(),
        "kl_mean": kl.mean(),
        "kl_max": kl.max(),
        "top1": agree.mean(),
        "ppl_reference": math.exp(nll_p.mean()),
        "ppl_test": math.exp(nll_q.mean()),
        "ppl_delta": math.exp(nll_q.mean() - nll_p.mean()) - 1,
        "ppl_error": (nll_q - nll_p).std(ddof=1) / math.sqrt(N),
        "overturned": margins.max(),
    }
    # sums over 96 float32 logits: a few times 2**-24
    assert {key: getattr(got, key) for key in expected} == pytest.approx(expected, rel=2e-6)
    counted = {
        "positions": N,
        "disagreements": (~agree).sum(),
        "near_ties": (margins < difference.max()).sum(),
        "greedy_prefix": agree.argmin(),
        "scored": N,
        "bad_reference": 0,
        "bad_test": 0,
    }
    assert {key: getattr(got, key) for key in counted} == counted


def test_equal_logits_differ_in_nothing(logits):
    reference, _, targets = logits
    got = compare_logits(reference, reference.copy(), targets)
    assert (got.max_abs, got.relative, got.kl_mean, got.kl_max, got.ppl_delta, got.ppl_error) == (0,) * 6
    assert (got.top1, got.greedy_prefix, got.disagreements, got.overturned) == (1, N, 0, 0)
    assert got.cosine == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 10.0, 40.0])
def test_kl_keeps_its_digits_from_rounding_noise_to_another_model(size):
    rng = np.random.default_rng(5)
    reference = (rng.standard_normal((8, 4096)) * 4).astype(np.float32)
    test = reference + (rng.standard_normal((8, 4096)) * size).astype(np.float32)
    log_p, log_q = (np.log(probabilities(rows)) for rows in (reference, test))
    difference = test.astype(np.float64) - reference
    p, mean = np.exp(log_p), (np.exp(log_p) * difference).sum(axis=1, keepdims=True)
    kl = np.log1p((p * np.expm1(difference - mean)).sum(axis=1))  # the same number, exact for small differences too
    got = compare_logits(reference, test, [7] * 8)
    assert got.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert got.ppl_test == pytest.approx(math.exp(-log_q[:, 7].mean()), rel=1e-5)


def test_kl_points_from_the_reference_to_the_test():
    reference, test = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert compare_logits(reference, test).kl_mean == pytest.approx(forward, rel=1e-6)
    assert compare_logits(test, reference).kl_mean == pytest.approx(backward, rel=1e-6)


def test_softmax_survives_logits_of_any_size():
    assert np.exp(log_softmax(np.array([5000.0, 4990.0], np.float32))).sum() == pytest.approx(1, abs=1e-15)
    got = compare_logits(np.array([[4000.0, 0.0]]), np.array([[0.0, 4000.0]]), [0])
    assert (got.kl_mean, got.ppl_reference, got.ppl_test) == (4000, 1, math.inf)


def test_small_logits_are_not_divided_by():
    # max_abs / max(1, max_abs_logit): noise on a model that predicts nothing is no divergence
    got = compare_logits(np.array([[0.25, 0.0]]), np.array([[0.0, 0.0]]))
    assert got.relative == 0.25


def test_a_near_tie_is_told_from_a_wrong_answer():
    tie = compare_logits(np.array([[1.0, 0.999, -4]]), np.array([[0.999, 1.0, -4]]))
    assert (tie.disagreements, tie.near_ties) == (1, 0)  # the margin 0.001 is not below the largest difference 0.001
    tie = compare_logits(np.array([[1.0, 0.9995, -4]]), np.array([[0.999, 1.0, -4]]))
    assert (tie.disagreements, tie.near_ties) == (1, 1)
    assert tie.overturned == pytest.approx(0.0005)
    wrong = compare_logits(np.array([[3.0, 1.0]] * 2), np.array([[3.0, 1.0], [2.0, 2.1]]))
    assert (wrong.disagreements, wrong.near_ties, wrong.top1, wrong.greedy_prefix) == (1, 0, 0.5, 1)
    assert wrong.overturned == 2


def test_the_greedy_prefix_is_the_shortest_of_the_rows_and_ends_at_the_first_miss():
    right, flipped = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    comparison = Comparison()
    for row, answers in enumerate(([right] * 4, [right, right, flipped, right])):
        for answer in answers:
            comparison.add(right, answer, 0, row=row)
    assert comparison.result().greedy_prefix == 2
    interleaved = Comparison()
    for step in range(4):
        interleaved.add(right, right, 0, row=0)
        interleaved.add(right, flipped if step == 2 else right, 0, row=1)
    assert interleaved.result().greedy_prefix == 2
    assert interleaved.result().top1 == comparison.result().top1 == 7 / 8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_position_with_a_bad_logit_is_counted_and_not_averaged(logits, bad):
    reference, test, targets = logits
    clean = compare_logits(np.delete(reference, 1, 0), np.delete(test, 1, 0), np.delete(targets, 1))
    test = test.copy()
    test[1, 5:7] = bad
    got = compare_logits(reference, test, targets)
    assert (got.bad_test, got.bad_reference, got.positions, got.scored) == (2, 0, N, N - 1)
    assert (got.kl_mean, got.max_abs, got.ppl_delta) == (clean.kl_mean, clean.max_abs, clean.ppl_delta)
    assert got.greedy_prefix <= 1
    swapped = compare_logits(test, reference, targets)
    assert (swapped.bad_test, swapped.bad_reference) == (0, 2)


def test_nothing_finite_and_nothing_at_all_are_not_zero():
    for got in (Comparison().result(), compare_logits(np.full((2, 3), np.nan), np.zeros((2, 3)), [0, 0])):
        assert all(math.isnan(x) for x in (got.max_abs, got.relative, got.kl_mean, got.top1, got.ppl_delta, got.cosine))
        written = json.loads(json.dumps(got.to_json(), allow_nan=False))
        assert (written["relative"], written["kl_mean"], written["greedy_prefix"]) == (None, None, 0)


def test_the_error_of_a_perplexity_change_needs_two_positions():
    one = compare_logits(np.array([[1.0, 0.0]]), np.array([[1.1, 0.0]]), [0])
    assert math.isfinite(one.ppl_delta)
    assert math.isnan(one.ppl_error)
    assert math.isnan(compare_logits(np.eye(2), np.eye(2)).ppl_delta)  # no targets


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_logits(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="cannot be compared"):
        Comparison().add(np.zeros(3), np.zeros(1))
