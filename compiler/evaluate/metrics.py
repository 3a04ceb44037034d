"""Distances between pictures that should be equal: PSNR, SSIM, and relative errors of tensors.

Pictures are [N, C, H, W] arrays of floats; every metric returns one number for each picture, in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from sdc.engines.errors import InputError

PSNR_CEILING_DB = 100.0
"""Averages count a better PSNR as this much: the infinity of one equal pair would hide every damaged one in a mean."""

SSIM_WINDOW = 11
"""Pixels along a side of the window, with ``SSIM_SIGMA`` its Gaussian. Source: Wang et al., "Image quality
assessment: from error visibility to structural similarity", IEEE TIP 13(4), 2004, section III-C; K1 and K2 too."""

SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def psnr(left: np.ndarray, right: np.ndarray, *, data_range: float = 1.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of pictures.

    Args:
        left: [N, C, H, W]; likewise `right`.
        data_range: difference between the largest and the smallest value that a pixel may take.

    Returns:
        [N], dB; infinity where the pictures are equal.

    Raises:
        InputError: the shapes differ, or `data_range` is not positive.
    """
    _check_pair(left, right, data_range)
    error = np.square(left.astype(np.float64) - right.astype(np.float64)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(data_range**2 / error))


def ssim(left: np.ndarray, right: np.ndarray, *, data_range: float = 1.0) -> np.ndarray:
    """Structural similarity of each pair of pictures, the mean over channels and every whole 11x11 window.

    Args:
        left: [N, C, H, W]; likewise `right`.
        data_range: difference between the largest and the smallest value that a pixel may take.

    Returns:
        [N]; 1 where the pictures are equal.

    Raises:
        InputError: the shapes differ, a side is shorter than the window, or `data_range` is not positive.

    Source: Wang et al. 2004, equation 13, with the paper's window and constants.
    """
    _check_pair(left, right, data_range)
    if min(left.shape[2:]) < SSIM_WINDOW:
        raise InputError(
            f"SSIM needs pictures of {SSIM_WINDOW}x{SSIM_WINDOW} pixels or more, found {left.shape[2]}x{left.shape[3]}"
        )
    x, y = left.astype(np.float64), right.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return np.asarray(similarity.mean(axis=(1, 2, 3)))


def relative_rms_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference over that of `wanted`; 0 when both are all zero.

    Raises:
        InputError: the shapes differ.
    """
    if found.shape != wanted.shape:
        raise InputError(f"tensors of one shape expected, found {found.shape} and {wanted.shape}")
    error = float(np.sqrt(np.square(found.astype(np.float64) - wanted.astype(np.float64)).mean()))
    scale = float(np.sqrt(np.square(wanted.astype(np.float64)).mean()))
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return error / scale


def _blur(pictures: np.ndarray) -> np.ndarray:
    """Gaussian mean of every whole window: [N, C, H, W] to [N, C, H - 10, W - 10]."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()
    rows = sliding_window_view(pictures, SSIM_WINDOW, axis=2) @ weights
    return np.asarray(sliding_window_view(rows, SSIM_WINDOW, axis=3) @ weights)


def _check_pair(left: np.ndarray, right: np.ndarray, data_range: float) -> None:
    if left.shape != right.shape or left.ndim != 4:
        raise InputError(
            f"two stacks of pictures [N, C, H, W] of one shape expected, found {left.shape}, {right.shape}"
        )
    if data_range <= 0:
        raise InputError(f"data_range must be positive, found {data_range}")
