import numpy as np
import pytest
import torch

from gemma_deploy.quantization.rtn import quantize_rows, quantize_rows_, row_scales, sqnr_db


def numpy_rtn(w):
    scale = (np.abs(w).max(1) / np.float32(127)).astype(np.float32)
    scale[scale == 0] = 1
    q = np.clip(np.rint(w / scale[:, None]), -127, 127).astype(np.int8)
    return q, scale


def gaussian(rows, cols, seed=0, std=0.02):
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * std).astype(np.float32)


@pytest.mark.parametrize("std", [1e-30, 0.02, 1e30])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 7), (64, 640), (17, 2048)])
def test_equals_numpy_bit_for_bit(rows, cols, std):
    w = gaussian(rows, cols, std=std)
    q, scale, _, _ = quantize_rows(w)
    expected_q, expected_scale = numpy_rtn(w)
    np.testing.assert_array_equal(q.numpy(), expected_q)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)


def test_rounds_half_to_even():
    w = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    assert quantize_rows(w)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_zero_rows_and_underflowing_rows_have_scale_one():
    w = np.zeros((3, 8), np.float32)
    w[1, 3] = 1e-45  # the smallest subnormal: / 127 is zero
    w[2, 0] = 1e-41
    q, scale, _signal, error = quantize_rows(w)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert q[:2].abs().max() == 0
    assert 0 < scale[2] < 1e-42
    assert q.abs().max() <= 127
    assert np.isfinite(error)


def test_leaves_its_input_alone_and_takes_tensors():
    w = gaussian(8, 64)
    kept, tensor = w.copy(), torch.tensor(w)
    from_array, from_tensor = quantize_rows(w), quantize_rows(tensor)
    np.testing.assert_array_equal(w, kept)
    np.testing.assert_array_equal(tensor.numpy(), kept)
    assert torch.equal(from_array[0], from_tensor[0])
    w.flags.writeable = False
    assert torch.equal(quantize_rows(w)[0], from_array[0])


@pytest.mark.parametrize("std", [1e-30, 0.02, 1e30])
def test_powers_follow_the_formula(std):
    w = gaussian(32, 512, std=std)
    q, scale, signal, error = quantize_rows(w)
    exact = w.astype(np.float64)
    noise = exact - q.numpy().astype(np.float64) * scale.numpy().astype(np.float64)[:, None]
    expected = 10 * np.log10((exact**2).sum() / (noise**2).sum())
    assert sqnr_db(signal, error) == pytest.approx(expected, abs=1e-4)


def test_gaussian_rows_reach_38_db():
    for cols in (640, 2048, 16384):
        _, _, signal, error = quantize_rows(gaussian(64, cols, seed=cols))
        assert sqnr_db(signal, error) >= 38


def test_no_noise_or_no_signal_has_no_ratio():
    assert sqnr_db(1.0, 0.0) is None
    assert sqnr_db(0.0, 0.0) is None
    assert sqnr_db(100.0, 1.0) == pytest.approx(20)


@pytest.mark.parametrize("cols", [1, 31, 640, 2048])
def test_powers_of_a_row_do_not_depend_on_its_block(cols):
    w = torch.tensor(gaussian(13, cols))

    def powers(block):
        parts = []
        for rows in w.split(block):
            scale = row_scales(rows.abs().amax(1))
            q = torch.empty(rows.shape, dtype=torch.int8)
            parts.append(torch.stack(quantize_rows_(rows.clone(), scale, q, scratch=torch.empty_like(rows))))
        return torch.cat(parts, 1)

    for block in (1, 2, 5):
        assert torch.equal(powers(block), powers(13))
