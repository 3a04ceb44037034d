"""Pairs of pictures with a map of their difference, as HTML with the pictures in it."""

from __future__ import annotations

import base64
import io
import math
from html import escape

import numpy as np
from PIL import Image

from sdc.compiler.compare.pictures import PictureComparison, PicturePairs

SMALL_PX = 128
"""Pictures up to this side are shown larger than they are, with their pixels kept apart."""

LARGEST_GAIN = 1 << 16

_MAP = np.array([[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]], np.float64)
"""Colours of the difference map from none to much: dark violet over red to light yellow, in equal steps."""


def picture_pairs(pairs: PicturePairs, comparison: PictureComparison) -> str:
    """All pairs, each with its prompt and figures."""
    difference = np.abs(pairs.first - pairs.second).max(axis=1)
    gain = difference_gain(difference)
    small = " small" if max(pairs.first.shape[2:]) <= SMALL_PX else ""
    figures = []
    for index, prompt in enumerate(comparison.prompts):
        pictures = (
            ("first", _colours(pairs.first[index])),
            ("second", _colours(pairs.second[index])),
            (
                f"difference ×{gain:g}" if difference[index].any() else "no difference",
                _mapped(difference[index], gain),
            ),
        )
        row = "".join(
            f'<div><img class="picture{small}" alt="{escape(name)}" src="{_data_uri(pixels)}">{escape(name)}</div>'
            for name, pixels in pictures
        )
        text = f"seed {comparison.seeds[index]}, PSNR {comparison.psnr_db[index]:.2f} dB"
        if comparison.ssim is not None:
            text += f", SSIM {comparison.ssim[index]:.4f}"
        figures.append(
            f'<figure class="pair"><div class="row">{row}</div><figcaption><div class="prompt">{escape(prompt)}</div>'
            f"{text}</figcaption></figure>"
        )
    return f'<div class="pairs">\n{"".join(figures)}\n</div>'


def difference_gain(difference: np.ndarray) -> float:
    """The power of two by which the map is amplified, alike in all pairs: 0.1 % of pixels may saturate."""
    large = float(np.quantile(difference, 0.999))
    if large <= 0:
        return 1.0
    return float(min(LARGEST_GAIN, max(1, 2 ** math.floor(math.log2(1 / large)))))


def _colours(picture: np.ndarray) -> np.ndarray:
    return np.asarray((picture.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def _mapped(difference: np.ndarray, gain: float) -> np.ndarray:
    """[H, W] in [0, 1] to [H, W, 3], uint8."""
    place = np.clip(difference * gain, 0, 1) * (len(_MAP) - 1)
    channels = [np.interp(place, np.arange(len(_MAP)), _MAP[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _data_uri(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
