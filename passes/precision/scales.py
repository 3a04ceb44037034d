"""Steps of integers, as values that a later cast to float16 does not change."""

from __future__ import annotations

import numpy as np


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
