"""One block of memory for all buffers: where each of them lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdc.passes.memory.lifetimes import Lifetime


@dataclass(frozen=True)
class Arena:
    """A block of memory and the places in it.

    Attributes:
        offsets: in bytes, in the order of the lifetimes that were given.
        bytes: size of the block.
    """

    offsets: tuple[int, ...]
    bytes: int


def place_buffers(lifetimes: Sequence[Lifetime]) -> Arena:
    """Offsets such that no two buffers that live at the same time overlap.

    The largest first, each into the smallest gap that holds it between those that live at the same time, or behind
    all of them. The block is never larger than the sum of all buffers.

    Source: Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020 (arXiv:2001.03288), 5.3,
    "Greedy by Size for Offset Calculation".
    """
    begin, end, size = (
        np.array([getattr(each, field) for each in lifetimes], np.int64) for field in ("begin", "end", "bytes")
    )
    offset = np.full(len(lifetimes), -1, np.int64)
    for index in sorted(range(len(lifetimes)), key=lambda each: (-size[each], begin[each], each)):
        neighbours = np.flatnonzero((offset >= 0) & (begin <= end[index]) & (begin[index] <= end))
        neighbours = neighbours[np.argsort(offset[neighbours], kind="stable")]
        offset[index] = _best_gap(offset[neighbours], size[neighbours], int(size[index]))
    return Arena(tuple(offset.tolist()), int((offset + size).max(initial=0)))


def _best_gap(offsets: NDArray[np.int64], sizes: NDArray[np.int64], wanted: int) -> int:
    """Where `wanted` bytes fit most tightly between blocks sorted by offset, which may overlap; else behind them."""
    ends = np.maximum.accumulate(offsets + sizes)
    begins = np.concatenate([[0], ends])[:-1] if len(ends) else ends
    gaps = offsets - begins
    fitting = np.flatnonzero(gaps >= max(wanted, 1))
    if len(fitting):
        return int(begins[fitting[np.argmin(gaps[fitting])]])
    return int(ends[-1]) if len(ends) else 0
