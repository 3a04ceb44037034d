"""Attention in float64, and bf16 in NumPy."""

from __future__ import annotations

import numpy as np


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
