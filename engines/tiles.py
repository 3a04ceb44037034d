"""Large pictures from a decoder of small ones: overlapping tiles, blended linearly.

Tiles of one size keep an engine that was compiled for a size; those at the edges overlap more instead of being smaller.
Each tile has statistics of its own in the decoder's group norms, and attention that sees nothing beyond it, so that a
picture in tiles is not quite the one that is decoded whole; the fewer edges, the nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
"""[N, C, H, W], float32."""

OVERLAP = 4
"""Neighbours share at least one part in so many of a tile. Source: ``enable_vae_tiling`` of diffusers has a quarter."""


def tile_starts(size: int, tile: int) -> tuple[int, ...]:
    """Where tiles begin on an axis of `size`: as few as overlap enough, spread evenly, the last one ending at the end.

    Args:
        size: of the whole, in any unit.
        tile: of a tile; one that is larger than the whole is as large as it.
    """
    if tile >= size:
        return (0,)
    stride = tile - -(-tile // OVERLAP)
    last = -(-(size - tile) // max(1, stride))
    return tuple(number * (size - tile) // last for number in range(last + 1))


def decode_in_tiles(
    decode: Callable[[Pixels], Pixels], latents: Pixels, tile: tuple[int, int], *, scale: int
) -> Pixels:
    """Decode latents tile by tile.

    Where all tiles agree the result is theirs to the bit; a single tile is decoded as it is.

    Args:
        decode: [N, C, h, w] to [N, 3, scale h, scale w].
        latents: [N, C, H, W], float32.
        tile: height and width of tiles, in latents.
        scale: pixels for each latent.

    Returns:
        [N, 3, scale H, scale W], float32.
    """
    height, width = latents.shape[2:]
    tall, wide = min(tile[0], height), min(tile[1], width)
    tops, lefts = tile_starts(height, tall), tile_starts(width, wide)

    def strip(top: int) -> Pixels:
        parts = (decode(latents[:, :, top : top + tall, left : left + wide]) for left in lefts)
        return join_tiles(parts, [scale * left for left in lefts], axis=3)

    return join_tiles(map(strip, tops), [scale * top for top in tops], axis=2)


def join_tiles(parts: Iterable[Pixels], starts: Sequence[int], *, axis: int) -> Pixels:
    """One array of overlapping parts of one size; over each overlap the later part takes over linearly.

    Args:
        parts: in the order of their starts; each is needed only until the next is taken.
        starts: where they begin along `axis`, the first at 0.
        axis: along which they follow each other.
    """
    if len(starts) == 1:
        return next(iter(parts))
    joined: Pixels | None = None
    end = 0
    for start, part in zip(starts, parts, strict=True):
        ahead = np.moveaxis(part, axis, 0)
        if joined is None:
            shape = list(part.shape)
            shape[axis] += starts[-1]
            joined = np.empty(shape, part.dtype)
        whole = np.moveaxis(joined, axis, 0)
        overlap = end - start
        if overlap > 0:
            before = whole[start:end]
            before += (ahead[:overlap] - before) * _ramp(overlap, part.ndim)
        whole[max(start, end) : start + len(ahead)] = ahead[max(0, overlap) :]
        end = start + len(ahead)
    assert joined is not None
    return joined


def _ramp(length: int, axes: int) -> Pixels:
    """[length, 1, ...], float32: the later part's weight at the middle of each place, from nearly 0 to nearly 1."""
    weights = (np.arange(length, dtype=np.float32) + np.float32(0.5)) / np.float32(length)
    return weights.reshape(-1, *[1] * (axes - 1))
