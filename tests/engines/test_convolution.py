"""The CPU kernel of convolution against float64."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import numpy as np
import pytest
from attention_reference import bits_from_floats, floats_from_bits, relative_error, rows
from convolution_reference import SHAPES, TOLERANCE, convolution, convolve, draw, gelu

from sdc.engines.errors import InputError
from sdc.engines.kernels.convolution import Quantisation


@pytest.mark.parametrize("bytes", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(convolver, shape, bytes):
    case = draw(shape, bytes=bytes)
    found, expected = convolve(convolver, case), convolution(case)
    assert relative_error(found, expected) < TOLERANCE
    np.testing.assert_allclose(found, expected, rtol=2**-8 + 1e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("bytes", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_equals_float64(convolver, shape, bytes):
    case = draw(shape, bytes=bytes, gated=True)
    found, expected = convolve(convolver, case), convolution(case)
    assert relative_error(found, expected) < 2**-8  # few elements make out most of it
    # Gelu's exponential and reciprocal have errors of 1.1e-4 and 2^-14 beside that of rounding.
    np.testing.assert_allclose(found, expected, rtol=2**-8 + 3e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("bytes", [False, True])
@pytest.mark.parametrize(
    ("window", "margins"), [(2, (0, 0)), (2, (0, 1)), (2, (1, 0)), (2, (1, 1)), (3, (2, 0)), (4, (0, 3))]
)
def test_margins_on_any_side(convolver, window, margins, bytes):
    case = dataclasses.replace(draw((2, 6, 9, 70, 40, window), bytes=bytes), margins=margins)
    assert relative_error(convolve(convolver, case), convolution(case)) < TOLERANCE


def test_gates_far_out(convolver):
    """Where they are open or closed altogether, and where little is let through."""
    gates = np.array([-200.0, -12.0, -6.0, -3.0, -0.01, 0.0, 0.01, 3.0, 6.0, 200.0], np.float32)
    case = draw((1, 1, 3, 8, 10, 1), bytes=False, gated=True)
    offsets = np.concatenate([np.ones(10, np.float32), gates])
    found = convolve(convolver, dataclasses.replace(case, factors=0 * case.factors, offsets=offsets))
    expected = gelu(gates.astype(np.float64))
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=2**-8 + 1e-3, atol=1e-30)


def test_weights_of_matrices_may_be_transposed(convolver):
    case = draw((1, 1, 20, 64, 24, 1), bytes=True, gated=True)
    weights, gates = (np.ascontiguousarray(each[:, :, 0, 0].T).T for each in (case.weights, case.gates))
    np.testing.assert_array_equal(
        convolve(convolver, dataclasses.replace(case, weights=weights, gates=gates)), convolve(convolver, case)
    )


def test_sums_of_bytes_are_exact(convolver):
    """More products than float32 sums without rounding; the result is one integer, small enough for bf16."""
    case = draw((1, 2, 2, 2560, 8, 3), bytes=True)
    weights = np.full(case.weights.shape, 127, np.int8)
    weights[:, ::2] = -127
    weights[:, 0, 1, 1] = -100
    images = bits_from_floats(np.full(case.images.shape, 1000.0, np.float32))
    ones = np.ones(8, np.float32)
    case = dataclasses.replace(
        case, images=images, weights=weights, factors=ones, offsets=0 * ones, quantisation=Quantisation(1.0, 1)
    )
    sum_ = bits_from_floats(np.full((1, 4, 8), 27 * 254, np.float32))
    np.testing.assert_array_equal(convolve(convolver, case), floats_from_bits(sum_))


def test_what_is_out_of_range_saturates(convolver):
    case = draw((1, 4, 4, 70, 20, 3), bytes=True)
    images = floats_from_bits(case.images)
    images[0, 3] = 1e30
    images[0, 4] = -1e30
    case = dataclasses.replace(case, images=bits_from_floats(images))
    assert relative_error(convolve(convolver, case), convolution(case)) < TOLERANCE


def test_weights_in_float32_are_rounded(convolver):
    case = draw((1, 5, 5, 48, 36, 3), bytes=False)
    exact = floats_from_bits(case.weights) * np.float32(1 + 2**-10)  # less than half a step above
    rounded = convolve(convolver, dataclasses.replace(case, weights=np.ascontiguousarray(exact)))
    np.testing.assert_array_equal(rounded, convolve(convolver, case))


def test_weights_in_float16_are_rounded(convolver):
    case = draw((1, 5, 5, 48, 36, 3), bytes=False)
    halves = floats_from_bits(case.weights).astype(np.float16)
    halves[0, :6, 0, 0] = [2**-24, -(2**-15), 65504, -0.0, 0.0, 2**-14]  # subnormal ones, the largest, zeros
    found = convolve(convolver, dataclasses.replace(case, weights=halves))
    expected = convolve(convolver, dataclasses.replace(case, weights=halves.astype(np.float32)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_reaches_its_neighbours_only(convolver, value):
    case = draw((2, 9, 10, 40, 20, 3), bytes=False)
    whole = convolve(convolver, case)
    images = case.images.copy()
    images[1, 4 * 10 + 5, 7] = bits_from_floats(np.full(1, value, np.float32))[0]
    found = convolve(convolver, dataclasses.replace(case, images=images)).reshape(2, 9, 10, 20)
    assert not np.isfinite(found[1, 3:6, 4:7]).any()
    found[1, 3:6, 4:7] = whole.reshape(found.shape)[1, 3:6, 4:7]
    np.testing.assert_array_equal(found, whole.reshape(found.shape))


def test_parts_of_larger_tensors(convolver):
    """Strides between pixels and between images; nothing beside the part is written."""
    case = draw((2, 6, 6, 40, 20, 3), bytes=False)
    source = np.full((2, 40, 50), 0x7FC0, np.uint16)  # NaN
    source[:, 2:38, 5:45] = case.images
    target = np.full((2, 40, 30), 0x4321, np.uint16)
    convolver.convolve(
        rows(source[:, 2:38, 5:45]), rows(target[:, 1:37, 4:24]), convolver.pack(case.weights),
        size=case.size, factors=case.factors, offsets=case.offsets,
    )  # fmt: skip
    expected = np.full(target.shape, floats_from_bits(np.uint16(0x4321)))
    expected[:, 1:37, 4:24] = convolve(convolver, case)
    np.testing.assert_array_equal(floats_from_bits(target), expected)


def test_gives_the_same_bits_every_time_and_from_many_threads(convolver):
    """Whatever size came before in the same memory."""
    kinds = [(bytes, gated) for bytes in (False, True) for gated in (False, True)]
    calls = [draw(shape, bytes=bytes, gated=gated) for shape in SHAPES for bytes, gated in kinds] * 2
    expected = [convolve(convolver, case) for case in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(lambda case: convolve(convolver, case), calls), expected, strict=True):
            np.testing.assert_array_equal(found, one)


def test_what_does_not_fit_is_refused(convolver):
    case, of_bytes = (draw((1, 4, 4, 64, 32, 3), bytes=bytes) for bytes in (False, True))
    with pytest.raises(InputError, match="margins must be smaller than the window"):
        convolve(convolver, dataclasses.replace(case, margins=(1, 3)))
    with pytest.raises(InputError, match="as high as they are wide"):
        convolver.pack(np.zeros((4, 4, 1, 3), np.float32))
    with pytest.raises(InputError, match="weights must be floats or int8"):
        convolver.pack(np.zeros((4, 4, 3, 3)))
    with pytest.raises(InputError, match="gates must be like the weights"):
        convolver.pack(case.weights, case.weights[:31])
    with pytest.raises(InputError, match="windows must lie without gaps"):
        convolver.pack(np.zeros((4, 4, 4, 4), np.float32)[:, :, :3, :3])
    with pytest.raises(InputError, match="do not fit weights"):
        convolve(convolver, dataclasses.replace(case, size=(3, 4)))
    with pytest.raises(InputError, match="do not fit weights"):
        convolve(convolver, dataclasses.replace(case, images=case.images[:, :, :63]))
    with pytest.raises(InputError, match=r"must be float32, \[32\]"):
        convolve(convolver, dataclasses.replace(case, factors=case.factors[:31]))
    with pytest.raises(InputError, match="weights in int8 go with a quantised input"):
        convolve(convolver, dataclasses.replace(case, quantisation=Quantisation(1.0, 0)))
    with pytest.raises(InputError, match="weights in int8 go with a quantised input"):
        convolve(convolver, dataclasses.replace(of_bytes, quantisation=None))
    with pytest.raises(InputError, match="the scale must be positive"):
        convolve(convolver, dataclasses.replace(of_bytes, quantisation=Quantisation(0.0, 3)))
    with pytest.raises(InputError, match="from 0 to 255"):
        convolve(convolver, dataclasses.replace(of_bytes, quantisation=Quantisation(1.0, 256)))
    large = draw((1, 1, 1, 7400, 1, 3), bytes=True)
    with pytest.raises(InputError, match="too many products"):
        convolve(convolver, large)


def test_a_machine_without_amx_has_none(kernels_without_amx):
    assert kernels_without_amx.convolver is None


def test_pixels_of_four_images_are_interleaved(kernels):
    generator = np.random.default_rng(1)
    phases = generator.integers(0, 2**16, (4, 2, 5, 7, 33), np.uint16)
    output = np.zeros((2, 10, 14, 33), np.uint16)
    flat = rows(output.reshape(2, -1, 33))
    kernels.interleave([rows(each.reshape(2, -1, 33)) for each in phases], flat, size=(5, 7))
    expected = phases.reshape(2, 2, 2, 5, 7, 33).transpose(2, 3, 0, 4, 1, 5).reshape(output.shape)
    np.testing.assert_array_equal(output, expected)
    with pytest.raises(InputError, match="do not fit each other"):
        kernels.interleave([rows(each.reshape(2, -1, 33)) for each in phases[:3]], flat, size=(5, 7))


def test_channels_of_two_images_are_joined(kernels):
    generator = np.random.default_rng(1)
    for left, right in ((64, 32), (1, 3), (640, 320)):
        images = [generator.integers(0, 2**16, (2, 77, channels), np.uint16) for channels in (left, right)]
        output = np.zeros((2, 77, left + right), np.uint16)
        kernels.join_channels(*(rows(each) for each in images), rows(output))
        np.testing.assert_array_equal(output, np.concatenate(images, axis=2))
    with pytest.raises(InputError, match="do not fit each other"):
        kernels.join_channels(rows(images[0]), rows(images[1][:1]), rows(output))
