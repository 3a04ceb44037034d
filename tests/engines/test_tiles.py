"""Tiles: where they lie, what their blending leaves alone, and how they meet."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdc.engines.tiles import OVERLAP, decode_in_tiles, join_tiles, tile_starts

SCALE = 3


def pointwise(latents: np.ndarray) -> np.ndarray:
    """A decoder in which a pixel depends on one latent: [N, C, h, w] to [N, 3, 3 h, 3 w]."""
    colours = np.tanh(latents[:, :3] * latents[:, -1:])
    return colours.repeat(SCALE, axis=2).repeat(SCALE, axis=3)


def neighbours(latents: np.ndarray) -> np.ndarray:
    """A decoder whose pixels depend on the latents beside theirs too, zeros beyond the edge."""
    padded = np.pad(latents[:, :3], ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = latents.shape[2:]
    shifted = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return sum(shifted[1:], shifted[0]).repeat(SCALE, axis=2).repeat(SCALE, axis=3)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape, np.float32)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 64))
def test_tiles_cover_overlap_and_are_as_few_as_can_be(size: int, tile: int) -> None:
    starts = tile_starts(size, tile)
    assert starts[0] == 0
    if tile >= size:
        assert starts == (0,)
        return
    assert starts[-1] + tile == size
    stride = max(1, tile - -(-tile // OVERLAP))
    steps = np.diff(starts)
    assert steps.min() > 0
    assert steps.max() <= stride
    assert steps.max() - steps.min() <= 1, "spread evenly"
    assert (len(starts) - 2) * stride + tile < size, "one tile fewer would not do"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 12), st.integers(1, 12))
def test_tiles_that_agree_give_the_whole_to_the_bit(height: int, width: int, tall: int, wide: int) -> None:
    latents = noise(2, 4, height, width)
    shapes = []

    def decode(tile: np.ndarray) -> np.ndarray:
        shapes.append(tile.shape)
        return pointwise(tile)

    made = decode_in_tiles(decode, latents, (tall, wide), scale=SCALE)
    assert made.tobytes() == pointwise(latents).tobytes()
    assert made.dtype == np.float32
    assert set(shapes) == {(2, 4, min(tall, height), min(wide, width))}, "all tiles are of one size"


def test_edges_of_tiles_show_in_overlaps_alone() -> None:
    latents = noise(1, 4, 21, 34)
    made, whole = decode_in_tiles(neighbours, latents, (8, 12), scale=SCALE), neighbours(latents)
    once = np.ones(made.shape[2:], bool)
    for axis, size, tile in ((0, 21, 8), (1, 34, 12)):
        starts = tile_starts(size, tile)
        for before, after in pairwise(starts):
            np.moveaxis(once, axis, 0)[SCALE * after : SCALE * (before + tile)] = False
    assert 0.2 < once.mean() < 0.6
    np.testing.assert_array_equal(made[..., once], whole[..., once])
    assert np.abs(made - whole).max() > 0.01, "this decoder's tiles have edges"


def test_over_an_overlap_the_later_part_takes_over_linearly() -> None:
    first, second = np.zeros((1, 1, 2, 8), np.float32), np.ones((1, 1, 2, 8), np.float32)
    joined = join_tiles(iter([first, second]), [0, 4], axis=3)
    np.testing.assert_array_equal(joined[0, 0, 1], [0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])
    assert not first.any(), "parts are left as they are"
    upright = join_tiles([first.swapaxes(2, 3), second.swapaxes(2, 3)], [0, 4], axis=2)
    np.testing.assert_array_equal(upright, joined.swapaxes(2, 3))


@pytest.mark.parametrize("tile", [(5, 7), (6, 7), (5, 100)])
def test_a_single_tile_is_what_was_decoded(tile: tuple[int, int]) -> None:
    latents = noise(1, 4, 5, 7)
    decoded = pointwise(latents)
    assert decode_in_tiles(lambda _: decoded, latents, tile, scale=SCALE) is decoded
