"""Second moments against NumPy in float64: their sum, their factor, their damping, and what makes a factor fail."""

import numpy as np
import pytest
import torch

from gemma_deploy.calibration.observers import MomentObserver, moment_block, quick_products
from gemma_deploy.quantization import moments as module
from gemma_deploy.quantization.moments import BLOCK, MOST_ATTEMPTS, NotPositiveError, factorize

# One block, one that is not full, several with an odd rest.
SIZES = [1, 7, 64, BLOCK, BLOCK + 1, 2 * BLOCK + 37]


def correlated(columns, tokens, seed=0):
    """Inputs [tokens, columns] whose channels predict each other, of powers over two orders of magnitude."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, columns)) @ (np.eye(columns) + 0.1 * rng.standard_normal((columns, columns)))
    return (mixed * 10 ** rng.uniform(-0.5, 0.5, columns)).astype(np.float32)


def moments_of(inputs):
    return torch.from_numpy((inputs.astype(np.float64).T @ inputs / len(inputs)).astype(np.float32))


def damped(moments, damping):
    """What a factor must multiply to, and what its errors are measured by: the diagonal's root, row by column."""
    full = moments.double().numpy()
    root = np.sqrt(np.diag(full))
    return full + damping * np.diag(np.diag(full)), np.outer(root, root)


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_observer_is_the_mean_of_outer_products(pieces):
    inputs = correlated(33, 90)
    observer = MomentObserver(33)
    for piece in np.split(inputs, pieces):
        observer.update(torch.from_numpy(piece).view(2, -1, 33))  # any leading dimensions
    assert observer.count == 90
    expected, unit = damped(moments_of(inputs), 0)
    found = observer.take()
    # float32 sums of 90 products, in units of the two channels: 3e-7 measured.
    assert (np.abs(found.double().numpy() - expected) / unit).max() < 5e-6
    assert torch.equal(found, found.T)
    assert observer.total.numel() == 0  # given away, not kept twice


def test_the_observer_takes_any_float_and_an_empty_one_gives_zeros():
    observer = MomentObserver(2)
    assert torch.equal(observer.take(), torch.zeros(2, 2))
    observer = MomentObserver(2)
    observer.update(torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.bfloat16))
    assert observer.take().tolist() == [[5.0, -0.5], [-0.5, 2.5]]


@pytest.mark.parametrize("columns", SIZES)
def test_the_factor_multiplies_to_the_damped_moments(columns):
    original = moments_of(correlated(columns, 2 * columns + 50))
    factor = factorize(original.clone(), 0.1)
    assert (factor.damping, factor.attempts) == (0.1, 1)
    r = factor.upper.triu().double().numpy()
    expected, unit = damped(original, 0.1)
    # 3e-7 measured: float32.
    assert (np.abs(r @ r.T - expected) / unit).max() < 3e-6
    assert (np.diag(r) > 0).all()
    assert torch.equal(factor.upper.tril(-1), original.tril(-1))
    assert torch.equal(factor.diagonal, original.diagonal())


@pytest.mark.parametrize("columns", [5, BLOCK + 9])
def test_unit_columns_and_conditional_power(columns):
    original = moments_of(correlated(columns, 3 * columns))
    factor = factorize(original.clone(), 0.1)
    # NumPy's factor is lower triangular from the first column on; turned around it is this one.
    lower = np.linalg.cholesky(damped(original, 0.1)[0][::-1, ::-1])
    r = lower[::-1, ::-1]
    rows, some = slice(0, columns - 2), slice(columns - 3, columns)
    expected = r[rows, some] / np.diag(r)[some]
    np.testing.assert_allclose(
        factor.unit_columns(rows, some).numpy(), expected, rtol=0, atol=1e-5 * abs(expected).max()
    )
    # The power of channel j that the channels after it do not predict is 1 / (inverse of their moments with it)_jj.
    tail = damped(original, 0.1)[0][columns - 4 :, columns - 4 :]
    residual = 1 / np.linalg.inv(tail)[0, 0]
    assert float(factor.conditional_power[columns - 4]) == pytest.approx(residual, rel=1e-4)


@pytest.mark.parametrize("columns", SIZES)
def test_energy_is_the_undamped_quadratic_form(columns):
    original = moments_of(correlated(columns, columns + 10))
    error = np.random.default_rng(3).standard_normal((columns, 6)).astype(np.float32)
    factor = factorize(original.clone(), 0.5)
    expected = np.einsum("jr,jk,kr->r", error, original.double().numpy(), error, optimize=True)
    found = factor.energy(torch.from_numpy(error))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6)  # 1e-7 measured


def test_inputs_scaled_against_each_other_change_the_factor_by_that_scale_alone():
    inputs = correlated(40, 200)
    scale = 2.0 ** np.random.default_rng(1).integers(-4, 4, 40).astype(np.float32)  # exact in float32
    plain, scaled = (factorize(moments_of(each), 0.2) for each in (inputs, inputs * scale))
    np.testing.assert_array_equal(scaled.upper.triu().numpy(), (plain.upper.triu() * torch.from_numpy(scale)[:, None]))


@pytest.mark.parametrize("columns", [30, BLOCK + 30])
def test_too_few_tokens_raise_the_damping_tenfold_and_say_so(columns):
    """Rank a third of the columns: without damping there is no factor, and the second attempt begins from the same."""
    original = moments_of(correlated(columns, columns // 3))
    factor = factorize(original.clone(), 0.0)
    assert factor.attempts == 2
    assert factor.damping == pytest.approx(1e-3)
    r = factor.upper.triu().double().numpy()
    expected, unit = damped(original, factor.damping)
    assert (np.abs(r @ r.T - expected) / unit).max() < 3e-6
    assert torch.equal(factor.upper.tril(-1), original.tril(-1))


def test_what_is_no_matrix_of_moments_fails_after_all_attempts(monkeypatch):
    tried, real = [], module._factorize

    def counted(a):
        tried.append(float(a[0, 0]))
        return real(a)

    monkeypatch.setattr(module, "_factorize", counted)
    with pytest.raises(NotPositiveError):
        factorize(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 0.01)
    assert len(tried) == MOST_ATTEMPTS
    np.testing.assert_allclose(tried, 1 + 0.01 * 10.0 ** np.arange(MOST_ATTEMPTS), rtol=1e-6)
    with pytest.raises(NotPositiveError):
        factorize(torch.full((3, 3), torch.nan), 0.01)


def test_channels_below_a_millionth_of_the_mean_power_get_that_on_the_diagonal():
    inputs = correlated(20, 100)
    inputs[:, 3] *= 1e-6
    original = moments_of(inputs)
    factor = factorize(original.clone(), 0.1)
    r = factor.upper.triu().double().numpy()
    assert (r @ r.T)[3, 3] == pytest.approx(1e-6 * float(original.diagonal().mean()), rel=1e-5)
    assert (r @ r.T)[4, 4] == pytest.approx(1.1 * float(original[4, 4]), rel=1e-5)


@pytest.mark.parametrize("alive", [0, 1, 20])
def test_dead_channels_get_a_small_diagonal(alive):
    inputs = correlated(20, 100)
    inputs[:, alive:] = 0
    factor = factorize(moments_of(inputs), 0.1)
    assert factor.attempts == 1
    assert (factor.upper.diagonal() > 0).all()
    assert torch.equal(factor.diagonal[alive:], torch.zeros(20 - alive))
    error = torch.ones(20, 1)
    error[:alive] = 0
    assert float(factor.energy(error)) == 0


def test_quick_products_keep_correlations_and_end_with_their_block():
    """Channels of very different size; NumPy's float64 is the reference, and nothing is quick outside the block."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4096, 96)) @ rng.standard_normal((96, 512)) * np.exp(rng.normal(0, 2, 512))
    x = x.astype(np.float32)
    exact = x.T.astype(np.float64) @ x
    size = np.sqrt(exact.diagonal())
    with quick_products():
        quick = moment_block(torch.from_numpy(x), 0)
    after = moment_block(torch.from_numpy(x), 0)
    assert np.abs((quick.numpy() - exact) / size / size[:, None]).max() < 5e-4  # of a correlation; measured 1e-4
    assert np.abs((after.numpy() - exact) / size / size[:, None]).max() < 2e-6
    if torch.cpu.get_capabilities().get("amx_bf16"):
        assert not torch.equal(quick, after)
