"""Convolution in float64, and calls of the CPU kernel on arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from attention_reference import bits_from_floats, floats_from_bits, rows

from sdc.engines.kernels.convolution import Convolver, Quantisation

SHAPES = (
    (1, 1, 64, 96, 48, 1), (1, 3, 16, 64, 8, 1),
    (2, 8, 8, 64, 32, 3), (1, 8, 8, 96, 64, 3), (2, 5, 7, 33, 40, 3), (1, 1, 1, 8, 3, 3), (3, 4, 6, 130, 65, 3),
    (2, 16, 16, 40, 33, 1), (1, 3, 50, 20, 17, 5), (2, 40, 48, 12, 20, 3), (9, 2, 3, 70, 16, 3), (1, 33, 65, 4, 4, 3),
)  # fmt: skip
"""Batch, height, width, channels, outputs, window: around the sizes of tiles, planes, pairs and tasks."""
TOLERANCE = 2.2e-3
"""The result is rounded to bf16 with a relative error of up to 2^-8; 1.66e-3 on average."""
_erfc = np.vectorize(math.erfc, otypes=[np.float64])
QUANTISATION = Quantisation(0.03, 117)


@dataclass(frozen=True)
class Case:
    """Operands of one convolution.

    Attributes:
        images: [B, H · W, C], the bits of bf16.
        weights: [outputs, C, window, window]: the bits of bf16, or int8.
        gates: likewise, or None.
        size: height and width.
        factors: float32, [outputs], and those of the gates; likewise `offsets`.
        quantisation: with int8.
        margins: rows above images and columns left of them; None for half a window.
    """

    images: np.ndarray
    weights: np.ndarray
    gates: np.ndarray | None
    size: tuple[int, int]
    factors: np.ndarray
    offsets: np.ndarray
    quantisation: Quantisation | None
    margins: tuple[int, int] | None = None


def draw(shape: tuple[int, ...], *, bytes: bool, gated: bool = False, seed: int = 5) -> Case:
    """Operands of one of `SHAPES`."""
    batch, height, width, channels, outputs, window = shape
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((batch, height * width, channels)) + 0.2
    rows = 2 * outputs if gated else outputs
    factors, offsets = generator.standard_normal((2, rows)).astype(np.float32)
    kernel = (rows, channels, window, window)
    if bytes:
        weights = generator.integers(-128, 128, kernel, np.int8)
        factors *= 1e-3
    else:
        floats = generator.standard_normal(kernel) / np.sqrt(np.prod(kernel[1:]))
        weights = bits_from_floats(floats.astype(np.float32))
    bits = bits_from_floats(images.astype(np.float32))
    gates = weights[outputs:] if gated else None
    return Case(bits, weights[:outputs], gates, (height, width), factors, offsets, QUANTISATION if bytes else None)


def convolution(case: Case) -> np.ndarray:
    """In float64, [B, H · W, outputs]."""
    height, width = case.size
    values = floats_from_bits(case.images).astype(np.float64)
    stored = case.weights if case.gates is None else np.concatenate([case.weights, case.gates])
    weights = (stored if case.quantisation else floats_from_bits(stored)).astype(np.float64)
    if case.quantisation is not None:
        # As the kernel: in float32, with one rounding.
        scaled = np.float32(1) / np.float32(case.quantisation.scale) * values + case.quantisation.zero_point
        values = np.clip(np.rint(scaled.astype(np.float32)), 0, 255) - case.quantisation.zero_point
    batch, _, channels = values.shape
    window = weights.shape[2]
    top, left = case.margins or (window // 2, window // 2)
    images = values.reshape(batch, height, width, channels)
    padded = np.pad(images, ((0, 0), (top, window - 1 - top), (left, window - 1 - left), (0, 0)))
    sums = np.zeros((batch, height, width, len(weights)))
    for y in range(weights.shape[2]):
        for x in range(weights.shape[3]):
            sums += padded[:, y : y + height, x : x + width] @ weights[:, :, y, x].T
    results = (sums * case.factors + case.offsets).reshape(batch, height * width, -1)
    if case.gates is None:
        return results
    values, gates = np.split(results, 2, axis=2)
    return values * gelu(gates)


def gelu(x: np.ndarray) -> np.ndarray:
    """x · Φ(x), in float64."""
    return x * 0.5 * _erfc(-x / np.sqrt(2))


def convolve(convolver: Convolver, case: Case) -> np.ndarray:
    """The kernel's convolution, float32."""
    output = np.full((*case.images.shape[:2], len(case.weights)), 0xABCD, np.uint16)
    convolver.convolve(
        rows(case.images),
        rows(output),
        convolver.pack(case.weights, case.gates),
        size=case.size,
        factors=case.factors,
        offsets=case.offsets,
        margins=case.margins,
        quantisation=case.quantisation,
    )
    return floats_from_bits(output)
