"""The CPU kernel of group normalisation against float64."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
from attention_reference import bits_from_floats, floats_from_bits, relative_error, rows
from group_norm_reference import SHAPES, TOLERANCE, draw, group_norm, normalise

from sdc.engines.errors import InputError
from sdc.engines.kernels.library import Affine


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(kernels, shape, silu):
    images, affine = draw(shape)
    found = normalise(kernels, images, affine, groups=shape[3], silu=silu)
    expected = group_norm(images, affine, groups=shape[3], epsilon=1e-5, silu=silu)
    # SiLU's exponential and reciprocal have errors of 1.1e-4 and 2^-14 beside that of rounding.
    np.testing.assert_allclose(found, expected, rtol=2**-8 + 3e-4, atol=1e-5)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("shape", [(2, 300, 640, 32), (1, 4100, 64, 32)], ids=str)
@pytest.mark.parametrize("mean", [100.0, -1000.0, 1e6])
def test_a_mean_far_above_the_deviation_costs_nothing(kernels, shape, mean):
    """As bf16 keeps 8 bits, values differ by steps of mean / 128; the rarer one step is, the larger the ratio."""
    images, affine = draw(shape)
    deviation = np.abs(mean) / 100
    images = bits_from_floats((floats_from_bits(images) * deviation + mean).astype(np.float32))
    expected = group_norm(images, affine, groups=32, epsilon=1e-5, silu=False)
    assert relative_error(normalise(kernels, images, affine, groups=32), expected) < TOLERANCE


def test_one_value_far_from_all_others(kernels):
    """The first pixel, which differences are taken from."""
    images, affine = draw((1, 1000, 64, 32))
    images[0, 0] = bits_from_floats(np.full(64, 1e4, np.float32))
    expected = group_norm(images, affine, groups=32, epsilon=1e-5, silu=False)
    assert relative_error(normalise(kernels, images, affine, groups=32), expected) < TOLERANCE


@pytest.mark.parametrize("pixels", [1, 300])
def test_groups_without_any_variance(kernels, pixels):
    affine = draw((1, pixels, 64, 32))[1]
    images = bits_from_floats(np.full((1, pixels, 64), 3.0, np.float32))
    found = normalise(kernels, images, affine, groups=32)
    # Pixels times factors cancel with offsets: 3 · weight / √1e-5, up to 3,000, in float32.
    np.testing.assert_allclose(found, np.broadcast_to(affine.bias, found.shape), rtol=2**-8, atol=3000 * 2**-24)


@pytest.mark.parametrize("addends", [1, 3])
def test_an_addend_is_like_a_sum(kernels, addends):
    """For each image or for all; it moves the channels of a group apart, by more than they differ by themselves."""
    images, affine = draw((3, 300, 96, 8))
    addend = bits_from_floats(5 * np.random.default_rng(1).standard_normal((addends, 1, 96), np.float32))
    found = normalise(kernels, images, affine, groups=8, silu=True, addend=addend)
    expected = group_norm(images, affine, groups=8, epsilon=1e-5, silu=True, addend=addend)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("shape", [(2, 300, 320, 32), (1, 5, 30, 3)], ids=str)
def test_the_sum_of_two_images(kernels, shape):
    """Rounded to bf16 as it is written; and written where the output or an operand is."""
    images, affine = draw(shape)
    other = draw(shape, mean=2.0, seed=6)[0]
    exact = bits_from_floats(floats_from_bits(images) + floats_from_bits(other))
    expected = normalise(kernels, exact, affine, groups=shape[3], silu=True)
    total = np.empty_like(images)
    found = normalise(kernels, images, affine, groups=shape[3], silu=True, summand=(other, total))
    np.testing.assert_array_equal(total, exact)
    np.testing.assert_array_equal(found, expected)
    found = normalise(kernels, images, affine, groups=shape[3], silu=True, summand=(other, other))
    np.testing.assert_array_equal(other, exact)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("pixel", [0, 1, 299])
def test_nan_stays_in_its_group(kernels, pixel, value):
    images, affine = draw((2, 300, 64, 4))
    whole = normalise(kernels, images, affine, groups=4, silu=True)
    images[1, pixel, 17:18] = bits_from_floats(np.full(1, value, np.float32))
    found = normalise(kernels, images, affine, groups=4, silu=True)
    assert np.isnan(found[1, :, 16:32]).all()
    found[1, :, 16:32] = whole[1, :, 16:32]
    np.testing.assert_array_equal(found, whole)


def test_silu_far_out(kernels):
    """Where e^-v is no float any more."""
    images, _ = draw((1, 300, 64, 4))
    affine = Affine(np.full(64, 1e4, np.float32), np.zeros(64, np.float32))
    found = normalise(kernels, images, affine, groups=4, silu=True)
    with np.errstate(over="ignore"):
        expected = group_norm(images, affine, groups=4, epsilon=1e-5, silu=True)
    assert relative_error(found, expected) < TOLERANCE
    assert (found[expected == 0] == 0).all()


def test_parts_of_larger_tensors_and_in_place(kernels):
    """Strides between pixels and between images; nothing beside the part is written."""
    images, affine = draw((2, 50, 64, 32))
    large = np.full((2, 60, 100), 0x4321, np.uint16)
    large[:, 5:55, 3:67] = images
    part = rows(large[:, 5:55, 3:67])
    kernels.normalise_groups(part, part, affine, groups=32, epsilon=1e-5)
    expected = np.full(large.shape, floats_from_bits(np.uint16(0x4321)))
    expected[:, 5:55, 3:67] = normalise(kernels, images, affine, groups=32)
    np.testing.assert_array_equal(floats_from_bits(large), expected)


def test_gives_the_same_bits_every_time_and_from_many_threads(kernels):
    """Whatever size came before in the same memory."""
    cases = [draw(shape) for shape in SHAPES]
    calls = [(*case, shape[3]) for case, shape in zip(cases, SHAPES, strict=True)] * 4

    def call(arguments) -> np.ndarray:
        images, affine, groups = arguments
        return normalise(kernels, images, affine, groups=groups, silu=True)

    expected = [call(arguments) for arguments in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(call, calls), expected, strict=True):
            np.testing.assert_array_equal(found, one)


def test_what_does_not_fit_is_refused(kernels):
    images, affine = draw((1, 10, 64, 32))
    with pytest.raises(InputError, match="the number of groups must divide that of channels"):
        normalise(kernels, images, affine, groups=30)
    with pytest.raises(InputError, match="epsilon must be finite and not negative"):
        normalise(kernels, images, affine, groups=32, epsilon=-1e-3)
    with pytest.raises(InputError, match=r"weights of 64 channels do not fit each other: \(1, 10, 62\)"):
        normalise(kernels, images[:, :, :62], affine, groups=31)
    with pytest.raises(InputError, match="do not fit each other"):
        normalise(kernels, images, affine, groups=32, addend=images)
    with pytest.raises(InputError, match="do not fit each other"):
        normalise(kernels, images, affine, groups=32, summand=(images, images[:, :9]))
    with pytest.raises(InputError, match="weight and bias must be float32"):
        Affine(affine.weight.astype(np.float64), affine.bias)
