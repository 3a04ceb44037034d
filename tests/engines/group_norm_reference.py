"""Group normalisation in float64, and calls of the CPU kernel on arrays."""

from __future__ import annotations

import numpy as np
from attention_reference import bits_from_floats, floats_from_bits, rows

from sdc.engines.kernels.library import Affine, Kernels

SHAPES = (
    (2, 64, 320, 32), (1, 1, 64, 32), (3, 7, 66, 33), (1, 256, 128, 32), (1, 257, 144, 16), (2, 1000, 40, 2),
    (1, 515, 960, 32), (2, 63, 2560, 32), (1, 4, 6, 6), (1, 333, 17, 1), (1, 2, 1, 1),
)  # fmt: skip
"""[B, pixels, channels], groups: around the sizes of chunks, blocks and vectors; 1 to 80 channels a group."""
TOLERANCE = 2.2e-3
"""The result is rounded to bf16 with a relative error of up to 2^-8; 1.66e-3 on average,
and a little more by chance where there are few elements."""


def draw(shape: tuple[int, int, int, int], *, mean: float = 0.3, seed: int = 5) -> tuple[np.ndarray, Affine]:
    """Images in bf16, and weights."""
    generator = np.random.default_rng(seed)
    images = generator.standard_normal(shape[:3]) + mean
    weight, bias = generator.standard_normal((2, shape[2])).astype(np.float32)
    return bits_from_floats(images.astype(np.float32)), Affine(weight, bias)


def group_norm(
    images: np.ndarray, affine: Affine, *, groups: int, epsilon: float, silu: bool, addend: np.ndarray | None = None
) -> np.ndarray:
    """In float64 over the bits of bf16, [B, pixels, channels]."""
    values = floats_from_bits(images).astype(np.float64)
    if addend is not None:
        values = values + floats_from_bits(addend)
    grouped = values.reshape(*values.shape[:2], groups, -1)
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    variance = (centred**2).mean(axis=(1, 3), keepdims=True)
    normalised = (centred / np.sqrt(variance + epsilon)).reshape(values.shape) * affine.weight + affine.bias
    return normalised / (1 + np.exp(-normalised)) if silu else normalised


def normalise(
    kernels: Kernels,
    images: np.ndarray,
    affine: Affine,
    *,
    groups: int,
    epsilon: float = 1e-5,
    silu: bool = False,
    addend: np.ndarray | None = None,
    summand: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """The kernel's normalisation, float32. With a summand and an array for the sum, that is written."""
    output = np.full(images.shape, 0xABCD, np.uint16)
    kernels.normalise_groups(
        rows(images),
        rows(output),
        affine,
        groups=groups,
        epsilon=epsilon,
        silu=silu,
        addend=None if addend is None else rows(addend),
        summand=None if summand is None else (rows(summand[0]), rows(summand[1])),
    )
    return floats_from_bits(output)
