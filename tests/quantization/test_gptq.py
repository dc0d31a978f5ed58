"""Error-compensated rounding against a plain NumPy GPTQ written from the paper, and its parts against NumPy."""

import gc
import weakref

import numpy as np
import pytest
import torch

from gemma_deploy.calibration.observers import MomentObserver
from gemma_deploy.quantization.equalize import column_factors
from gemma_deploy.quantization.gptq import gptq
from gemma_deploy.quantization.moments import BLOCK, NotPositiveError, factorize
from gemma_deploy.quantization.scales import choose_scales
from gemma_deploy.quantization.solver import Settings, solve

RNG = np.random.default_rng(3)
PLAIN = {"equalize": False, "act_order": False}


def correlated(columns, tokens=4096, seed=0):
    """[columns, columns] float32 moments of inputs that predict each other, with powers over two decades."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns // 4)) @ rng.standard_normal((columns // 4, columns))
    x = rng.standard_normal((tokens, columns)) @ (mixing / columns + np.eye(columns) * 0.3)
    x *= 10 ** rng.uniform(-1, 1, columns)
    return (x.T @ x / tokens).astype(np.float32)


def weights(rows, columns, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32))


def numpy_gptq(w, h, units, qmax, damping):
    """Frantar et al. 2022, algorithm 1 with blocks of one column, in float64: [rows, columns] codes."""
    w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
    h[np.diag_indices_from(h)] *= 1 + damping
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.rint(w[:, j] / units[:, j]), -qmax, qmax)
        error = (w[:, j] - codes[:, j] * units[:, j]) / upper[j, j]
        w[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    return codes


def energy(error, h):
    """Error of the outputs: error [rows, columns] -> [rows]."""
    return np.einsum("ri,ij,rj->r", error.astype(np.float64), h.astype(np.float64), error.astype(np.float64))


@pytest.mark.parametrize("columns", [24, 200, BLOCK + 88])
@pytest.mark.parametrize(("bits", "groupsize"), [(8, None), (4, None), (4, 8)])
def test_gives_the_codes_of_a_plain_numpy_gptq(columns, bits, groupsize):
    qmax, w, h = (1 << (bits - 1)) - 1, weights(48, columns), correlated(max(columns, 4))[:columns, :columns]
    scale = choose_scales(w, qmax, groupsize)
    units = scale.repeat_interleave(columns // scale.shape[1], 1)
    factor = factorize(torch.from_numpy(h.copy()), 0.1)
    codes = gptq(w.T.contiguous(), units.T.contiguous(), factor, qmax=qmax).T.numpy()
    expected = numpy_gptq(w.numpy(), h, units.numpy().astype(np.float64), qmax, 0.1)
    # float32 against float64: a value next to a half rounds the other way, and what follows it in its row moves along.
    assert (codes == expected).all(1).mean() >= (0.6 if columns > BLOCK else 0.9)
    np.testing.assert_allclose(
        energy(w.numpy() - codes * units.numpy(), h).sum(),
        energy(w.numpy() - expected * units.numpy(), h).sum(),
        rtol=0.005,
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_uncorrelated_inputs_give_round_to_nearest(bits):
    w = weights(32, 96)
    found = solve([w], torch.eye(96), Settings(bits=bits, **PLAIN)).weights[0]
    qmax = (1 << (bits - 1)) - 1
    nearest = (w / choose_scales(w, qmax)).round().clamp(-qmax, qmax).to(torch.int8)
    torch.testing.assert_close(found.codes, nearest, rtol=0, atol=0)
    assert found.loss == found.rtn_loss


@pytest.mark.parametrize("act_order", [False, True])
def test_correlated_inputs_lose_less_and_no_row_loses_more(act_order):
    w, h = weights(64, 160), correlated(160)
    settings = Settings(percdamp=0.01, equalize=False, act_order=act_order)
    found = solve([w], torch.from_numpy(h.copy()), settings).weights[0]
    scale = choose_scales(w, 127)
    nearest = energy((w - (w / scale).round() * scale).numpy(), h)
    ours = energy((w - found.dequantized()).numpy(), h)
    assert (ours <= nearest * (1 + 1e-5)).all()
    assert ours.sum() < 0.6 * nearest.sum()
    # Figures are computed in float32 from the same errors.
    assert found.loss == pytest.approx(ours.sum(), rel=1e-3)
    assert found.rtn_loss == pytest.approx(nearest.sum(), rel=1e-3)
    assert found.signal == pytest.approx(energy(w.numpy(), h).sum(), rel=1e-3)


def test_the_block_size_changes_nothing():
    w, h = weights(16, 160), correlated(160)
    codes = [
        solve([w], torch.from_numpy(h.copy()), Settings(blocksize=size, **PLAIN)).weights[0].codes
        for size in (8, 48, 128, 1024)
    ]
    for other in codes[:-1]:
        assert (other == codes[-1]).float().mean() > 0.995  # float32 sums in another order, values next to a half


def test_nothing_is_kept_alive_when_it_is_done():
    """Of a layer of gemma-2b it would be a gigabyte until Python looks for cycles."""
    w, factor = weights(64, 32), factorize(torch.from_numpy(correlated(64)), 0.01)
    gone = weakref.ref(w)
    gc.disable()
    try:
        codes = gptq(w, torch.full((64, 32), 0.01), factor, qmax=127)
        del w
        assert codes.shape == (64, 32)
        assert gone() is None
    finally:
        gc.enable()


def test_column_factors_beat_none_and_are_undone():
    w, h = weights(64, 96), correlated(96)
    w[:, 5] *= 40  # one column spoils every row's scale
    moments = torch.from_numpy(h.copy())
    plain = solve([w], moments.clone(), Settings(equalize=False)).weights[0]
    found = solve([w], moments.clone(), Settings())
    assert found.equalized
    error = (w - found.weights[0].dequantized() / found.factors).numpy()
    assert energy(error, h).sum() == pytest.approx(found.weights[0].loss, rel=1e-3)
    assert found.weights[0].loss < 0.1 * plain.loss


@pytest.mark.parametrize("groupsize", [None, 8])
def test_column_factors_minimize_the_stated_sum(groupsize):
    w, power = weights(40, 16) * torch.logspace(-1, 1, 16), torch.from_numpy(10 ** RNG.uniform(-2, 2, 16)).float()

    def objective(logs):
        s = np.exp(logs)
        peaks = (np.abs(w.numpy()) * s).reshape(40, -1, groupsize or 16).max(2) ** 2
        return (peaks.sum(0) * (power.numpy() / s**2).reshape(-1, groupsize or 16).sum(1)).sum()

    found = np.log(column_factors([w], power, groupsize=groupsize).numpy().astype(np.float64))
    best = objective(found)
    assert best < 0.75 * objective(np.zeros(16))
    walk = found.copy()
    for step in (0.3, 0.1, 0.03, 0.01):  # a coordinate search from there finds next to nothing more
        for _ in range(20):
            for column in range(16):
                for change in (step, -step):
                    walk[column] += change
                    if objective(walk) >= objective(found):
                        walk[column] -= change
                    else:
                        found = walk.copy()
    assert objective(found) > 0.9 * best


def test_columns_with_one_maker_have_one_factor():
    shared = torch.arange(16) % 4
    factors = column_factors([weights(40, 16) * torch.logspace(-1, 1, 16)], torch.ones(16), shared)
    assert all(len(set(factors[shared == k].tolist())) == 1 for k in range(4))
    assert len(set(factors.tolist())) == 4


def test_dead_channels_are_counted_and_harmless():
    h = correlated(64)
    h[7], h[:, 7] = 0, 0
    found = solve([weights(16, 64)], torch.from_numpy(h), Settings())
    assert found.dead == 1
    assert torch.isfinite(found.weights[0].scale).all()
    assert found.weights[0].loss <= found.weights[0].rtn_loss


def test_a_matrix_of_zeros_stays_zero():
    found = solve([torch.zeros(8, 32)], torch.from_numpy(correlated(32)), Settings()).weights[0]
    assert not found.codes.any()
    assert found.loss == 0


def test_four_bits_in_groups_beat_one_scale_per_row():
    w, h = weights(64, 128), correlated(128)
    w *= torch.from_numpy(10 ** RNG.uniform(-1, 0, 128)).float()
    losses = [
        solve([w], torch.from_numpy(h.copy()), Settings(bits=4, groupsize=size, equalize=False)).weights[0].loss
        for size in (None, 32)
    ]
    assert losses[1] < losses[0]
    codes = solve([w], torch.from_numpy(h.copy()), Settings(bits=4, groupsize=32)).weights[0].codes
    assert codes.min() >= -7
    assert codes.max() == 7


@pytest.mark.parametrize("columns", [3, BLOCK, 2 * BLOCK + 100])
def test_the_factor_is_that_of_the_damped_moments(columns):
    h = correlated(max(columns, 4), 256)[:columns, :columns]
    factor = factorize(torch.from_numpy(h.copy()), 0.05)
    r = factor.upper.triu().numpy().astype(np.float64)
    damped = h + np.diag(np.diag(h)) * 0.05
    np.testing.assert_allclose(r @ r.T, damped, atol=1e-5 * damped.max(), rtol=1e-4)
    np.testing.assert_array_equal(factor.upper.numpy()[np.tril_indices(columns, -1)], h[np.tril_indices(columns, -1)])
    error = RNG.standard_normal((columns, 9)).astype(np.float32)
    np.testing.assert_allclose(factor.energy(torch.from_numpy(error)).numpy(), energy(error.T, h), rtol=1e-4)
    assert (factor.damping, factor.attempts) == (0.05, 1)


def test_a_failed_factorization_raises_the_damping_and_says_so():
    h = torch.full((40, 40), 1.5)  # correlations above 1: no covariance has them
    h.diagonal().fill_(1.0)
    factor = factorize(h, 0.1)
    assert factor.attempts == 2
    assert factor.damping == pytest.approx(1.0)
    with pytest.raises(NotPositiveError):
        factorize(torch.full((4, 4), float("nan")), 0.1)


def test_moments_are_the_mean_of_outer_products():
    x = RNG.standard_normal((3, 5, 7)).astype(np.float32)
    observer = MomentObserver(7)
    for window in x:
        observer.update(torch.from_numpy(window[None]))
    rows = x.reshape(-1, 7).astype(np.float64)
    np.testing.assert_allclose(observer.take().numpy(), rows.T @ rows / 15, rtol=1e-5, atol=1e-6)
