"""PSNR and SSIM against closed forms and against the definition written out window by window."""

import math

import numpy as np
import pytest

from sdc.compiler.evaluate.metrics import psnr, relative_rms_error, ssim
from sdc.engines.errors import InputError


def random_pictures(seed: int, shape: tuple[int, ...] = (3, 2, 17, 13)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def test_psnr_of_a_constant_offset_has_a_closed_form() -> None:
    left = random_pictures(1)
    offsets = np.array([0.5, 0.01, 0.002])[:, None, None, None]
    expected = -20 * np.log10(offsets.ravel())
    np.testing.assert_allclose(psnr(left.astype(np.float64) + offsets, left), expected, rtol=1e-9)


def test_psnr_scales_with_the_data_range() -> None:
    left, right = random_pictures(2), random_pictures(3)
    np.testing.assert_allclose(psnr(255 * left, 255 * right, data_range=255), psnr(left, right), rtol=1e-5)


def test_psnr_of_one_changed_pixel() -> None:
    left = np.zeros((1, 1, 16, 25))
    right = left.copy()
    right[0, 0, 3, 4] = 1
    assert psnr(left, right)[0] == pytest.approx(10 * math.log10(16 * 25))


def test_equal_pictures_have_infinite_psnr_and_ssim_one() -> None:
    left = random_pictures(4)
    assert np.isposinf(psnr(left, left)).all()
    np.testing.assert_allclose(ssim(left, left), 1, rtol=1e-12)


def test_ssim_of_flat_pictures_has_a_closed_form() -> None:
    left, right = np.full((1, 3, 12, 19), 0.3), np.full((1, 3, 12, 19), 0.8)
    c1 = 0.01**2
    assert ssim(left, right)[0] == pytest.approx((2 * 0.3 * 0.8 + c1) / (0.3**2 + 0.8**2 + c1), rel=1e-9)


def ssim_window_by_window(left: np.ndarray, right: np.ndarray, data_range: float) -> float:
    """The definition with explicit loops and a two-dimensional window, for one picture [C, H, W]."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for channel in range(left.shape[0]):
        for row in range(left.shape[1] - 10):
            for column in range(left.shape[2] - 10):
                x = left[channel, row : row + 11, column : column + 11].astype(np.float64)
                y = right[channel, row : row + 11, column : column + 11].astype(np.float64)
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_equals_the_definition(data_range: float) -> None:
    left = random_pictures(5) * data_range
    right = left + 0.2 * data_range * random_pictures(6)
    expected = [ssim_window_by_window(x, y, data_range) for x, y in zip(left, right, strict=True)]
    np.testing.assert_allclose(ssim(left, right, data_range=data_range), expected, rtol=1e-9)


def test_ssim_falls_as_noise_grows() -> None:
    left = random_pictures(7, (1, 3, 32, 32))
    noise = np.random.default_rng(8).standard_normal(left.shape)
    values = [ssim(left, left + scale * noise)[0] for scale in (0.01, 0.1, 0.5)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.99
    assert values[2] < 0.6


def test_relative_rms_error() -> None:
    wanted = random_pictures(9)
    assert relative_rms_error(1.03 * wanted.astype(np.float64), wanted) == pytest.approx(0.03, rel=1e-6)
    assert relative_rms_error(wanted, wanted) == 0
    assert relative_rms_error(wanted, np.zeros_like(wanted)) == math.inf


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_pairs_of_different_shape_are_refused(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="one shape"):
        metric(random_pictures(1), random_pictures(1)[:, :, :-1])
    with pytest.raises(InputError, match="data_range"):
        metric(random_pictures(1), random_pictures(1), data_range=0)


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    small = random_pictures(1, (1, 3, 10, 40))
    with pytest.raises(InputError, match="11x11"):
        ssim(small, small)
