"""How far a figure would move with other seeds, estimated from one run.

The pictures of a run are split into groups; every figure is computed again with each group left out. From the spread
of these values follows the standard deviation that the figure has over seeds. It holds for means and for smooth
functions of moments such as the Fréchet distance, whose bias of order 1/N cancels out of the spread.

Source: Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 9(3), 1981; with groups: Kott,
"The delete-a-group jackknife", Journal of Official Statistics 17(4), 2001.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Figures = Mapping[str, float]

GROUPS = 10
"""With ten groups the standard deviation itself is known to about a quarter: 1 / sqrt(2 (10 - 1))."""


def seed_noise(figures: Callable[[np.ndarray], Figures], count: int, *, groups: int = GROUPS) -> dict[str, float]:
    """Standard deviation over seeds of every figure that `figures` gives.

    Groups are consecutive pictures, so that each holds the prompts in nearly equal shares.

    Args:
        figures: computes figures from the pictures with the given indices.
        count: pictures in the run.
        groups: how many groups; fewer if there are not at least two pictures for each.

    Returns:
        A value for each figure; nothing with fewer than four pictures, of which no spread can be told.
    """
    groups = min(groups, count // 2)
    if groups < 2:
        return {}
    labels = np.arange(count) * groups // count
    without = [figures(np.flatnonzero(labels != group)) for group in range(groups)]
    return {name: float(np.sqrt((groups - 1) * np.var([each[name] for each in without]))) for name in without[0]}
