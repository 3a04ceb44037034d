"""One block of memory for all buffers: where each of them lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdc.passes.memory.lifetimes import Lifetime, live_bytes


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

    One after the other they go into the smallest gap that holds them between those that live at the same time, or
    behind all of these. Two orders are tried, and the smaller block is taken; it is never larger than the sum of all.

    1. By size: the largest first.
    2. By breadth: first those that live at the fullest step, the largest of them first; then those of the next.

    Source: Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020 (arXiv:2001.03288),
    "Greedy by Size for Offset Calculation", and the order of "Greedy by Breadth" with the same search for gaps.
    """
    by_size = sorted(range(len(lifetimes)), key=lambda each: (-lifetimes[each].bytes, lifetimes[each].begin, each))
    arenas = [_place_in_order(lifetimes, order) for order in (by_size, _by_breadth(lifetimes, by_size))]
    return min(arenas, key=lambda arena: arena.bytes)


def _by_breadth(lifetimes: Sequence[Lifetime], by_size: Sequence[int]) -> list[int]:
    steps = max((each.end for each in lifetimes), default=-1) + 1
    breadth = live_bytes(lifetimes, steps).tolist()
    rank = {step: place for place, step in enumerate(sorted(range(steps), key=lambda step: (-breadth[step], step)))}
    fullest = [min(rank[step] for step in range(each.begin, each.end + 1)) for each in lifetimes]
    return sorted(by_size, key=lambda each: fullest[each])


def _place_in_order(lifetimes: Sequence[Lifetime], order: Sequence[int]) -> Arena:
    begin, end, size = (
        np.array([getattr(each, field) for each in lifetimes], np.int64) for field in ("begin", "end", "bytes")
    )
    offset = np.full(len(lifetimes), -1, np.int64)
    for index in order:
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
