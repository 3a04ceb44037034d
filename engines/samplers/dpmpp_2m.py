"""DPM-Solver++ 2M: Lu et al., arXiv:2211.01095, algorithm 2 (second-order multistep on the data prediction)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from sdc.engines.denoise import Denoise, Latents
from sdc.engines.noise import DrawNoise
from sdc.engines.schedule import (
    CLEAN,
    Schedule,
    Trajectory,
    Transition,
    spaced_timesteps,
    vp_level,
)


def plan_dpmpp_2m(schedule: Schedule, steps: int) -> Trajectory:
    """Variance-preserving levels at whole timesteps; the last step is clean.

    Raises:
        InputError: the schedule does not have so many steps.
    """
    spacing = schedule.timestep_spacing or "linspace"
    # The clean level takes the place of the last timestep, except where the spacing leaves that out by itself.
    timesteps = spaced_timesteps(schedule, steps, spacing, without_last=spacing != "trailing")
    alphas_cumprod = schedule.positive_alphas_cumprod()
    levels = [vp_level(timestep, float(alphas_cumprod[timestep])) for timestep in timesteps.astype(int).tolist()]
    return Trajectory(tuple(pairwise([*levels, CLEAN])))


def dpmpp_2m(denoise: Denoise, x: Latents, transitions: Sequence[Transition], _draw_noise: DrawNoise) -> Latents:
    """One network call a step, second order from the second step on; first order where the noise ends.

    lambda is half the log signal-to-noise ratio and h its growth over a step, as in the paper.
    """
    x0_before: Latents | None = None
    h_before = math.nan
    for now, then in transitions:
        x0 = denoise(x, now)
        h = then.log_snr - now.log_snr
        if x0_before is None or then.sigma == 0:
            d = x0
        else:
            r = h_before / h
            d = x0 + (x0 - x0_before) / (2 * r)
        x = (then.sigma / now.sigma) * x - (then.alpha * math.expm1(-h)) * d
        x0_before, h_before = x0, h
    return x
