"""The schedule of DeepCache that costs least, beside all others; for costs see engines/test_deepcache_pictures.py."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sdc.compiler.evaluate.cache_errors import Costs, cheapest_full_steps

STEPS = 8


def cost_of(costs: Costs, full: tuple[int, ...]) -> float:
    """Step by step."""
    total, last = 0.0, 0
    for step in range(len(costs)):
        last = step if step in full else last
        total += costs[last, step] if last != step else 0.0
    return float(total)


@pytest.mark.parametrize("count", range(1, STEPS + 1))
@pytest.mark.parametrize("seed", range(4))
def test_no_schedule_of_so_many_whole_steps_costs_less(seed: int, count: int) -> None:
    costs = np.triu(np.random.default_rng(seed).random((STEPS, STEPS)), k=1)
    found = cheapest_full_steps(costs, count)
    assert len(set(found)) == count
    assert found[0] == 0
    assert list(found) == sorted(found)
    least = min(cost_of(costs, (0, *rest)) for rest in combinations(range(1, STEPS), count - 1))
    assert cost_of(costs, found) == pytest.approx(least)


def test_whole_steps_are_where_features_change() -> None:
    """Features of steps 0 to 4 are alike, and those of 5 to 7."""
    costs = np.zeros((STEPS, STEPS))
    costs[:5, 5:] = 1.0
    assert cheapest_full_steps(costs, 2) == (0, 5)
