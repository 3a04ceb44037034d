"""Samplers: plain functions that read like their papers, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sdc.engines.denoise import Denoise, Latents
from sdc.engines.errors import InputError
from sdc.engines.noise import DrawNoise
from sdc.engines.samplers.ddim import ddim, plan_ddim
from sdc.engines.samplers.dpmpp_2m import dpmpp_2m, plan_dpmpp_2m
from sdc.engines.samplers.euler import euler, plan_euler
from sdc.engines.samplers.lcm import lcm, plan_lcm
from sdc.engines.schedule import Schedule, Trajectory, Transition

SampleFunction = Callable[[Denoise, Latents, Sequence[Transition], DrawNoise], Latents]
"""(denoise, x at the first level, steps, noise) -> x at the last level."""


@dataclass(frozen=True)
class Sampler:
    """A sampler by name.

    Attributes:
        name: on the command line.
        plan: the levels that it goes through in a number of steps.
        sample: the function itself.
        default_steps: a usual number of steps.
    """

    name: str
    plan: Callable[[Schedule, int], Trajectory]
    sample: SampleFunction
    default_steps: int = 20


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", plan_ddim, ddim),
        Sampler("lcm", plan_lcm, lcm, default_steps=4),
        Sampler("euler", plan_euler, euler),
        Sampler("dpmpp-2m", plan_dpmpp_2m, dpmpp_2m),
    )
}


def find_sampler(name: str, *, eta: float = 0.0) -> Sampler:
    """The sampler of that name.

    Args:
        name: a key of ``SAMPLERS``.
        eta: how much new noise DDIM adds at each step, from 0 to 1.

    Raises:
        InputError: there is no such sampler, or it cannot take this `eta`.
    """
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}", hint=f"choose from {', '.join(SAMPLERS)}")
    if eta == 0:
        return SAMPLERS[name]
    if name != "ddim":
        raise InputError(f"eta={eta} was given with the sampler {name}", hint="only ddim takes it")
    if not 0 <= eta <= 1:
        raise InputError(f"eta={eta} is outside 0 to 1")
    return replace(SAMPLERS[name], sample=partial(ddim, eta=eta))
