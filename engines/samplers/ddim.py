"""DDIM: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", arXiv:2010.02502."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from sdc.engines.denoise import Denoise, Latents
from sdc.engines.noise import DrawNoise
from sdc.engines.schedule import Schedule, Trajectory, Transition, spaced_timesteps, vp_level


def plan_ddim(schedule: Schedule, steps: int) -> Trajectory:
    """Variance-preserving levels; each step goes down by T / `steps`, the last to the schedule's final alpha.

    Raises:
        InputError: the schedule does not have so many steps.
    """
    timesteps = spaced_timesteps(schedule, steps, schedule.timestep_spacing or "leading")
    stride = len(schedule) // steps
    transitions = []
    for timestep in timesteps.astype(int).tolist():
        following = timestep - stride
        then = schedule.level(following) if following >= 0 else vp_level(following, schedule.final_alpha_cumprod)
        transitions.append((schedule.level(timestep), then))
    return Trajectory(tuple(transitions))


def plan_ddim_through(schedule: Schedule, timesteps: Sequence[int]) -> Trajectory:
    """The levels of any timesteps, which have to fall; the last step goes to the schedule's final alpha."""
    levels = [*map(schedule.level, timesteps), vp_level(-1, schedule.final_alpha_cumprod)]
    return Trajectory(tuple(pairwise(levels)))


def ddim(
    denoise: Denoise, x: Latents, transitions: Sequence[Transition], draw_noise: DrawNoise, *, eta: float = 0.0
) -> Latents:
    """Equation 12; `eta` 0 is deterministic and 1 is DDPM (equation 16)."""
    for now, then in transitions:
        x0 = denoise(x, now)
        epsilon = (x - now.alpha * x0) / now.sigma
        variance = (then.sigma / now.sigma) ** 2 * (1 - (now.alpha / then.alpha) ** 2)
        deviation = eta * math.sqrt(max(variance, 0.0))  # rounding may leave it just below zero
        x = then.alpha * x0 + math.sqrt(then.sigma**2 - deviation**2) * epsilon
        if eta > 0:
            x = x + deviation * draw_noise(x.shape)
    return x
