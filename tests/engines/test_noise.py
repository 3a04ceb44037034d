"""Random numbers against torch's CPU generator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sdc.engines.errors import InputError
from sdc.engines.noise import TorchGenerator, noise_from_seeds

TOLERANCE = 1e-6
"""Two float32 roundings of a value near 4: torch's vectorised logarithm and cosine are not NumPy's."""


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize(
    "shape", [(1,), (3, 5), (16,), (17,), (31,), (1, 4, 8, 8), (3, 5, 7, 9), (1, 4, 64, 64)], ids=str
)
def test_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    theirs = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    ours = TorchGenerator(seed).randn(shape)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_the_stream_goes_on_as_torchs() -> None:
    """Small tensors keep one value of a pair for later, which large ones in between leave alone."""
    torchs, ours = torch.Generator().manual_seed(5), TorchGenerator(5)
    for count in (3, 40, 1, 16, 2, 15, 17, 7):
        theirs = torch.randn(count, generator=torchs).numpy()
        np.testing.assert_allclose(ours.randn((count,)), theirs, rtol=0, atol=TOLERANCE, err_msg=f"{count} values")


def test_is_standard_normal() -> None:
    values = TorchGenerator(1).randn((200_000,))
    error = 5 / math.sqrt(len(values))
    assert abs(values.mean()) < error
    assert abs(values.var() - 1) < 2 * error
    assert abs((values**4).mean() - 3) < 20 * error


def test_one_seed_fills_the_batch_and_several_fill_their_rows() -> None:
    whole = noise_from_seeds([3])((2, 5, 7))
    np.testing.assert_array_equal(whole, TorchGenerator(3).randn((2, 5, 7)))
    draw = noise_from_seeds([3, 4])
    rows = draw((2, 5, 7))
    np.testing.assert_array_equal(rows[1], TorchGenerator(4).randn((5, 7)))
    assert not np.array_equal(draw((2, 5, 7)), rows)
    with pytest.raises(InputError, match="2 seeds were given for 3 pictures"):
        draw((3, 5, 7))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(InputError, match="outside 0 to"):
        TorchGenerator(seed)
