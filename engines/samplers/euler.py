"""Euler's method on the probability flow: Karras et al., arXiv:2206.00364, algorithm 2 without churn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sdc.engines.denoise import Denoise, Latents
from sdc.engines.noise import DrawNoise
from sdc.engines.schedule import (
    CLEAN,
    NoiseLevel,
    Schedule,
    Trajectory,
    Transition,
    spaced_timesteps,
)


def plan_euler(schedule: Schedule, steps: int) -> Trajectory:
    """Levels with alpha 1, whose sigma is interpolated between training timesteps; the last step is clean.

    Raises:
        InputError: the schedule does not have so many steps.
    """
    spacing = schedule.timestep_spacing or "linspace"
    timesteps = spaced_timesteps(schedule, steps, spacing, whole=False)
    alphas_cumprod = schedule.positive_alphas_cumprod()
    sigmas = np.interp(timesteps, np.arange(len(schedule)), np.sqrt((1 - alphas_cumprod) / alphas_cumprod))
    levels = [NoiseLevel(t, 1.0, sigma) for t, sigma in zip(timesteps.tolist(), sigmas.tolist(), strict=True)]
    # As diffusers: spacings that begin at the last timestep take the latents there for pure noise.
    start_scale = levels[0].scale if spacing == "leading" else levels[0].sigma
    return Trajectory(tuple(pairwise([*levels, CLEAN])), start_scale)


def euler(denoise: Denoise, x: Latents, transitions: Sequence[Transition], _draw_noise: DrawNoise) -> Latents:
    """One network call a step, first order."""
    for now, then in transitions:
        derivative = (x - denoise(x, now)) / now.sigma
        x = x + (then.sigma - now.sigma) * derivative
    return x
