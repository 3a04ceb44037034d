"""Which of a graph's waists are cut; see `shard`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SLACK = 1.05
"""The largest piece may be so much larger than it must be, where less crosses then: 5 % of a piece's weights are little
beside what a piece takes to run."""


def choose_cuts(weights: Sequence[Sequence[int]], crossing: Sequence[int], count: int) -> list[int]:
    """The cuts by which a line falls into `count` pieces.

    1. The least that the largest piece can weigh is found.
    2. Of all choices whose largest piece weighs at most `SLACK` times that, the one over whose cuts least crosses.

    Args:
        weights: bytes between any two of the possible cuts, both ends of the line among them; see
            `weight_bytes_between`.
        crossing: bytes that cross at each of them; 0 at the ends.
        count: of pieces, from 1 to ``len(crossing) - 1``.

    Returns:
        ``count + 1`` numbers of cuts, from the first to the last.

    Source: the linear partition problem by dynamic programming; Skiena, "The Algorithm Design Manual", section 10.7.
    """
    table = np.array(weights, np.float64)
    ends = len(crossing)
    forward = np.arange(ends)[:, None] < np.arange(ends)
    table[~forward] = np.inf
    largest = table[0]
    for _ in range(count - 1):
        largest = np.maximum(largest[:, None], table).min(axis=0)
    return _least_crossing(table <= SLACK * largest[-1], np.array(crossing, np.float64), count)


def _least_crossing(allowed: NDArray[np.bool_], crossing: NDArray[np.float64], count: int) -> list[int]:
    """The way of `count` steps from the first to the last cut, over allowed pieces, with the least sum."""
    steps = np.where(allowed, crossing, np.inf)
    total, came_from = steps[0], []
    for _ in range(count - 1):
        ways = total[:, None] + steps
        came_from.append(ways.argmin(axis=0))
        total = ways.min(axis=0)
    path = [len(crossing) - 1]
    for previous in reversed(came_from):
        path.append(int(previous[path[-1]]))
    return [0, *reversed(path)]
