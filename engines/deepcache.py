"""DeepCache's schedules: at which steps the whole UNet runs; the shallow one draws the others with its deep features.

Source: Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free", arXiv:2312.00858, sections 3.2 (uniform)
and 3.3 (non-uniform). Or they are chosen one by one: `sdc.compiler.evaluate.cache_errors` measures which lose least.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from sdc.engines.errors import InputError

POWER = 1.2
"""How fast distances grow away from the centre; source: ``sample_from_quad_center`` in the authors' code."""


CacheSchedule = int | tuple[int, ...]
"""Steps for each run of the whole UNet, 1 running it at each; or the very steps at which it runs."""


def full_steps(steps: int, schedule: CacheSchedule, center: int | None = None) -> frozenset[int]:
    """The steps at which the whole UNet runs; the first is always among them.

    Args:
        steps: of the sampler.
        schedule: the interval, or all full steps, from 0 and in order.
        center: None spaces full steps evenly, at i = 0, N, 2N and so on. A step makes their distances grow with the
            distance from it: i = center + sign(l) |l|^p for evenly spaced l.

    Returns:
        Indices from 0 to ``steps - 1``, one for each interval; fewer where two with a centre fall on one step.

    Raises:
        InputError: the interval is below 1, or the centre is no step, or has nothing to be the centre of; or the steps
            do not begin with 0, do not grow, or are too many.
    """
    if isinstance(schedule, int):
        return _steps_of_interval(steps, schedule, center)
    if center is not None:
        raise InputError("a centre of DeepCache was given with its full steps", hint="leave one of them out")
    told = ", ".join(map(str, schedule))
    if schedule[:1] != (0,) or any(after <= before for before, after in pairwise(schedule)):
        raise InputError(
            f"deepcache at the steps {told} was asked for", hint="begin with step 0, each later than the last"
        )
    if schedule[-1] >= steps:
        raise InputError(f"deepcache at the steps {told} was asked for, and the last of {steps} steps is {steps - 1}")
    return frozenset(schedule)


def _steps_of_interval(steps: int, interval: int, center: int | None) -> frozenset[int]:
    if interval < 1:
        raise InputError(f"deepcache {interval} was asked for", hint="choose 2 or more; 1 turns it off")
    if center is None:
        return frozenset(range(0, steps, interval))
    if interval == 1:
        raise InputError("a centre of DeepCache was given without DeepCache", hint="add an interval of 2 or more")
    if not 0 <= center < steps:
        raise InputError(f"deepcache center {center} is outside 0 to {steps - 1}, the steps")
    count = len(range(0, steps, interval))
    spread = np.linspace(_power(-center, 1 / POWER), _power(steps - center, 1 / POWER), count, endpoint=False)
    # What is a whole step but for rounding is that step.
    return frozenset({0, *(math.floor(center + _power(each, POWER) + 1e-9) for each in spread)})


def _power(base: float, exponent: float) -> float:
    """The power of the magnitude, with the sign of the base."""
    return math.copysign(abs(base) ** exponent, base)
