"""Steps of integers, as values that a later cast to float16 does not change."""

from __future__ import annotations

import numpy as np

LOWEST, HIGHEST = -128, 127
"""Of eight-bit integers."""


def affine_from_limits(low: np.ndarray, high: np.ndarray, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Steps (float32, float16 values) and the int8 integers of zero, of ranges that hold zero.

    A symmetric range +-r has the step r / 127 and the integer 0; another one, [a, b], has (b - a) / 255 and
    round(-128 - a / step).
    """
    if symmetric:
        return scale_from_range(np.maximum(-low, high), HIGHEST), np.zeros(low.shape, np.int8)
    scales = scale_from_range(high - low, HIGHEST - LOWEST)
    return scales, np.clip(np.round(LOWEST - low / scales), LOWEST, HIGHEST).astype(np.int8)


def scale_from_range(limit: np.ndarray, levels: int) -> np.ndarray:
    """The step that puts `limit` at or just below the integer `levels`, as a float16 value in float32.

    Rounding is upwards: nothing within the range saturates, and a cast to float16 is exact. A range of zero gets
    step 1. Steps beyond float16's range stay as they are: their activations would not fit into float16 either.
    """
    scale = np.asarray(limit, np.float32) / np.float32(levels)
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    half = np.where(half.astype(np.float32) < scale, np.nextafter(half, np.float16(np.inf)), half)
    rounded = np.where(np.isfinite(half), half.astype(np.float32), scale)
    return np.where(scale == 0, np.float32(1), rounded).astype(np.float32)
