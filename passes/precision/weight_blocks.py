"""Four-bit integers in blocks: each short run of a row's weights has a scale of its own, searched for."""

from __future__ import annotations

import numpy as np

_LOWEST, _HIGHEST = -8, 7
"""Source: ONNX, INT4 (opset 21): two's complement of four bits."""

_CANDIDATES = np.linspace(0.7, 1.05, 15, dtype=np.float32)
"""Steps to try, as parts of the step that just covers the block's largest magnitude.

Clipping a block's largest weight by a few percent often costs less than coarser steps for the others.
"""

_CHUNK_WEIGHTS = 2**22
"""Weights that are searched at a time; their candidates are in memory together."""


def quantise_blocks(rows: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric four-bit integers of a matrix, with the scale of each block that gives the least squared error.

    A scale may be negative, so that the one integer more on the negative side serves a block's largest weight whatever
    its sign.

    Args:
        rows: [N, K], float32, finite; one row for each output channel.
        block_size: divides K.

    Returns:
        The integers ([N, K], int8, -8 to 7) and the scales ([N, K / block_size], float32, each a float16 value).
    """
    count, width = rows.shape
    blocks = rows.reshape(-1, block_size)
    step = max(1, _CHUNK_WEIGHTS // block_size)
    parts = [_quantise(blocks[begin : begin + step]) for begin in range(0, len(blocks), step)]
    integers = np.concatenate([part[0] for part in parts]).reshape(count, width)
    return integers, np.concatenate([part[1] for part in parts]).reshape(count, width // block_size)


def _quantise(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers [M, block] and scales [M]."""
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    best_scale = np.ones(len(blocks), np.float32)
    best_error = np.full(len(blocks), np.inf, np.float32)
    for full in (extreme / _LOWEST, extreme / _HIGHEST):
        for part in _CANDIDATES:
            scale = _storable(full * part)
            error = np.square(_rounded(blocks, scale) * scale[:, None] - blocks).sum(axis=1)
            better = error < best_error
            best_scale, best_error = np.where(better, scale, best_scale), np.where(better, error, best_error)
    return _rounded(blocks, best_scale).astype(np.int8), best_scale


def _storable(scale: np.ndarray) -> np.ndarray:
    """The nearest float16 values in float32; zero, which nothing can be divided by, becomes 1."""
    half = scale.astype(np.float16).astype(np.float32)
    return np.where(half == 0, np.float32(1), half)


def _rounded(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.rint(blocks / scale[:, None]).clip(_LOWEST, _HIGHEST)
    return rounded
