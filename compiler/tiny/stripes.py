"""A style that is measured without a judge: garments with horizontal stripes, in which the background shows through."""

from __future__ import annotations

import numpy as np

from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS
from sdc.compiler.tiny.data import IMAGE_SIZE_PX

STRIPE_PX = 4
"""Height of a stripe, and of the gap to the next: one row of latents."""

OPACITY = 0.4
"""Of the garment within a stripe."""

MARGIN_PX = 2
"""Of a grey picture in the finished one."""


def in_stripe(height_px: int) -> np.ndarray:
    """[height_px], bool: rows of a finished picture that lie in a stripe; the first stripe begins at row 4."""
    return np.asarray(np.arange(height_px) // STRIPE_PX % 2 == 1)


def paint_stripes(pixels: np.ndarray) -> np.ndarray:
    """Grey pictures [N, 28, 28], uint8, with less opaque stripes; where they lie depends on the row alone."""
    rows = in_stripe(IMAGE_SIZE_PX)[MARGIN_PX:-MARGIN_PX]
    return np.round(pixels * np.where(rows, OPACITY, 1.0)[:, None]).astype(np.uint8)


def stripe_contrast(pictures: np.ndarray, colours: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
    """How much less opaque garments are within stripes than between them: (between - within) / (between + within).

    Opacity is what a pixel has of the way from its background's colour to its garment's; within and between are its
    sums over rows. A garment that covers all rows alike has 0 without stripes and (1 - OPACITY) / (1 + OPACITY), 0.43,
    with them; real garments do so on average only.

    Args:
        pictures: [N, 3, H, W], float32 in [0, 1].
        colours: [N], indices into ``COLOURS``: what was asked for. Likewise ``backgrounds`` into ``BACKGROUNDS``.
        backgrounds: see `colours`.

    Returns:
        [N]; 0 where there is less than one pixel of garment.
    """
    garment = (np.array(list(COLOURS.values())) / 255)[colours]
    background = (np.array(list(BACKGROUNDS.values())) / 255)[backgrounds]
    way = garment - background
    along = np.einsum("nchw,nc->nhw", pictures - background[:, :, None, None], way)
    opacity = along / np.square(way).sum(axis=1)[:, None, None]
    rows = opacity.clip(0, 1).sum(axis=2)
    within = rows[:, in_stripe(rows.shape[1])].sum(axis=1)
    total = rows.sum(axis=1)
    return np.where(total < 1, 0.0, (total - 2 * within) / np.maximum(total, 1))
