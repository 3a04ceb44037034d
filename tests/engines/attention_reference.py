"""Attention in float64, bf16 in NumPy, and calls of the CPU kernels on arrays."""

from __future__ import annotations

import numpy as np

from sdc.engines.kernels.library import Kernels
from sdc.engines.kernels.rows import Rows

SHAPES = (
    (2, 3, 130, 77, 40), (1, 2, 77, 77, 64), (3, 1, 257, 257, 80), (1, 2, 65, 300, 160), (2, 5, 33, 513, 8),
    (1, 1, 100, 129, 512), (1, 3, 1, 1, 2), (1, 1, 15, 2, 42), (2, 2, 16, 128, 34), (1, 1, 48, 127, 6),
    (1, 2, 7, 257, 70),
)  # fmt: skip
"""[B, heads, Sq, Sk, d] around the sizes of blocks, tiles and vectors."""


def bits_from_floats(values: np.ndarray) -> np.ndarray:
    """float32 → the bits of bf16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def floats_from_bits(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, heads: int, scale: float, causal: bool = False
) -> np.ndarray:
    """Attention in float64 over the bits of bf16: [B, Sq, heads · d], [B, Sk, heads · d] twice → [B, Sq, heads · d]."""
    split = [
        floats_from_bits(bits).astype(np.float64).reshape(*bits.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        for bits in (query, key, value)
    ]
    logits = split[0] @ split[1].swapaxes(2, 3) * scale
    if causal:
        logits = np.where(np.tri(*logits.shape[2:], dtype=bool), logits, -np.inf)
    powers = np.exp(logits - logits.max(axis=3, keepdims=True))
    result = powers / powers.sum(axis=3, keepdims=True) @ split[2]
    return result.transpose(0, 2, 1, 3).reshape(query.shape)


def rows(array: np.ndarray) -> Rows:
    """Where an array lies."""
    batch_stride, row_stride, last = (stride // array.itemsize for stride in array.strides)
    assert last == 1
    return Rows(array.ctypes.data, array.shape, (batch_stride, row_stride))


def draw(shape: tuple[int, int, int, int, int], *, spread: float = 1.0, seed: int = 7) -> list[np.ndarray]:
    """Query, key and value in bf16 for [B, heads, Sq, Sk, d]; logits have about the standard deviation `spread`."""
    batch, heads, queries, keys, size = shape
    generator = np.random.default_rng(seed)
    query = spread * generator.standard_normal((batch, queries, heads * size))
    others = generator.standard_normal((2, batch, keys, heads * size))
    return [bits_from_floats(array.astype(np.float32)) for array in (query, *others)]


def attend(
    kernels: Kernels, operands: list[np.ndarray], *, heads: int, causal: bool = False, eight_bits: bool = False
) -> np.ndarray:
    """The kernel's attention, float32."""
    output = np.full(operands[0].shape, 0xABCD, np.uint16)
    scale = (operands[0].shape[2] // heads) ** -0.5
    kernels.attend(*map(rows, (*operands, output)), heads=heads, scale=scale, causal=causal, eight_bits=eight_bits)
    return floats_from_bits(output)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of the whole array."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
