"""The CPU kernels' attention with products of 8-bit integers; what it shares with bf16 is in test_kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
from attention_reference import SHAPES, attend, attention, bits_from_floats, draw, floats_from_bits, relative_error


@pytest.fixture(scope="module")
def kernels(kernels_without_amx):
    """With AMX nothing is in 8 bits."""
    return kernels_without_amx


TOLERANCES = {0.01: 0.011, 1.0: 0.017, 3.0: 0.027, 20.0: 0.055}
"""By the logits' standard deviation. A scale is 1/127 of the largest of some 40 normal numbers, about 2.5/127, so that
rounding leaves an error of 2.5/127/√12 = 0.006 in queries, keys and values each; that of a logit grows with it, and so
does the relative error of a probability."""


@pytest.mark.parametrize("spread", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_as_far_as_8_bits_go(kernels, shape, spread):
    operands = draw(shape, spread=spread)
    expected = attention(*operands, heads=shape[1], scale=shape[4] ** -0.5)
    found = attend(kernels, operands, heads=shape[1], eight_bits=True)
    assert relative_error(found, expected) < TOLERANCES[spread]


def test_is_another_path_than_bf16(kernels):
    operands = draw((1, 2, 70, 300, 40))
    found = [attend(kernels, operands, heads=2, eight_bits=eight_bits) for eight_bits in (False, True)]
    assert relative_error(found[1], found[0]) > 0.005


def test_is_in_bf16_where_it_is_causal(kernels):
    operands = draw((1, 2, 70, 70, 40))
    found = [attend(kernels, operands, heads=2, causal=True, eight_bits=eight_bits) for eight_bits in (False, True)]
    np.testing.assert_array_equal(*found)


def test_what_keys_have_in_common_takes_no_bits(kernels):
    """Features of keys with a large mean, as trained models have them."""
    operands = draw((1, 2, 70, 1000, 40))
    means = np.where(np.arange(80) % 9 == 0, 30.0, 0.0)
    operands[1] = bits_from_floats((floats_from_bits(operands[1]) + means).astype(np.float32))
    expected = attention(*operands, heads=2, scale=40**-0.5)
    assert relative_error(attend(kernels, operands, heads=2, eight_bits=True), expected) < TOLERANCES[1.0]


@pytest.mark.parametrize("spread", [60.0, 1000.0, 1e6])
def test_logits_of_any_size(kernels, spread):
    """Roundings decide between logits that are nearly equal; the result is a mean of values nevertheless."""
    operands = draw((1, 2, 70, 1000, 40), spread=spread)
    # The largest logits last: the reference has to be raised in nearly every block, by far more than its headroom.
    operands[1] = bits_from_floats(floats_from_bits(operands[1]) * np.linspace(0.01, 1, 1000)[:, None])
    values = floats_from_bits(operands[2])
    found = attend(kernels, operands, heads=2, eight_bits=True)
    assert (found <= values.max(axis=1, keepdims=True) + 0.02).all()
    assert (found >= values.min(axis=1, keepdims=True) - 0.02).all()


def test_a_key_that_towers_above_the_others_is_taken_alone(kernels):
    """Key 151 answers query 3 by far the most, whatever the block that it is in."""
    operands = draw((1, 1, 20, 1000, 40))
    operands[1][0, 151] = bits_from_floats(20 * floats_from_bits(operands[0][0, 3]))
    found = attend(kernels, operands, heads=1, eight_bits=True)
    # Half a step of the values' scale.
    np.testing.assert_allclose(found[0, 3], floats_from_bits(operands[2][0, 151]), atol=3.5 / 127 / 2 + 0.01)


def test_rows_of_zeros_have_a_scale(kernels):
    operands = draw((1, 1, 20, 300, 40))
    operands[0][0, 5] = 0
    operands[1][0, 7] = 0
    expected = attention(*operands, heads=1, scale=40**-0.5)
    found = attend(kernels, operands, heads=1, eight_bits=True)
    assert relative_error(found, expected) < TOLERANCES[1.0]
    for operand in operands:
        operand[:] = 0
    assert (attend(kernels, operands, heads=1, eight_bits=True) == 0).all()
