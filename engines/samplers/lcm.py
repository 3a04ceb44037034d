"""Multistep sampling of a latent consistency model: Luo et al., arXiv:2310.04378."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sdc.engines.denoise import Denoise, Latents
from sdc.engines.errors import InputError
from sdc.engines.noise import DrawNoise
from sdc.engines.schedule import CLEAN, Schedule, Trajectory, Transition

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
"""Constants of the boundary condition: the paper's appendix C, and diffusers' `LCMScheduler` for the scaling."""


def plan_lcm(schedule: Schedule, steps: int) -> Trajectory:
    """Every so many of the timesteps of the distillation's schedule, from its noisiest; the last step is clean.

    Raises:
        InputError: the distillation's schedule does not have so many steps.
    """
    original = schedule.original_inference_steps
    if not 1 <= steps <= original:
        raise InputError(f"{steps} steps were asked for", hint=f"choose 1 to {original} with lcm; 4 to 8 are usual")
    distilled = (np.arange(1, original + 1) * (len(schedule) // original) - 1)[::-1]
    chosen = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    levels = [schedule.level(timestep) for timestep in distilled[chosen].tolist()]
    return Trajectory(tuple(pairwise([*levels, CLEAN])))


def lcm(denoise: Denoise, x: Latents, transitions: Sequence[Transition], draw_noise: DrawNoise) -> Latents:
    """Algorithm 3: jump to the clean latent, and noise it again to the next level."""
    for now, then in transitions:
        time = TIMESTEP_SCALING * now.timestep
        c_skip = SIGMA_DATA**2 / (time**2 + SIGMA_DATA**2)
        c_out = time / math.sqrt(time**2 + SIGMA_DATA**2)
        x = c_skip * x + c_out * denoise(x, now)
        if then.sigma > 0:
            x = then.alpha * x + then.sigma * draw_noise(x.shape)
    return x
