"""The noise schedule that a model was trained with, and how samplers step through it.

Notation throughout the runtime: a noisy latent is ``x = alpha * x0 + sigma * epsilon``. A variance-preserving level has
``alpha**2 + sigma**2 = 1`` and ``alpha**2 = alphas_cumprod[t]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdc.engines.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

ALMOST_NO_SIGNAL = 2.0**-24
"""Stands for a cumulative alpha of zero in diffusers' Euler and DPM-Solver schedulers."""


@dataclass(frozen=True)
class NoiseLevel:
    """How noisy a latent is: ``x = alpha * x0 + sigma * epsilon``.

    Attributes:
        timestep: what the network is told, in training steps; may lie between two.
        alpha: factor of the clean latent.
        sigma: factor of the noise.
    """

    timestep: float
    alpha: float
    sigma: float

    @property
    def scale(self) -> float:
        """Standard deviation of x for data and noise of unit variance; 1 if variance-preserving."""
        return math.hypot(self.alpha, self.sigma)

    @property
    def log_snr(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, lambda in the DPM-Solver papers; infinite without noise."""
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


CLEAN = NoiseLevel(timestep=0.0, alpha=1.0, sigma=0.0)
"""No noise: where every trajectory but DDIM's may end."""

Transition = tuple[NoiseLevel, NoiseLevel]
"""One step of a sampler: the level at which the network is called, and the level that the step leads to."""


@dataclass(frozen=True)
class Trajectory:
    """The steps of a sampler.

    Attributes:
        transitions: noisiest first.
        start_scale: unit noise times this starts the first of them.
    """

    transitions: tuple[Transition, ...]
    start_scale: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """A trained noise schedule.

    Attributes:
        alphas_cumprod: [T], float64, falling; 0 at the end for a schedule of zero terminal SNR.
        prediction_type: what the network predicts, one of ``PREDICTION_TYPES``.
        timestep_spacing: one of ``TIMESTEP_SPACINGS``; None leaves it to the sampler.
        steps_offset: added to timesteps of leading spacing.
        final_alpha_cumprod: DDIM's last level.
        original_inference_steps: steps of the schedule that LCM was distilled on.
    """

    alphas_cumprod: NDArray[np.float64]
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    final_alpha_cumprod: float = 1.0
    original_inference_steps: int = 50

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def level(self, timestep: int) -> NoiseLevel:
        """The variance-preserving level of a training timestep."""
        return vp_level(timestep, float(self.alphas_cumprod[timestep]))

    def positive_alphas_cumprod(self) -> NDArray[np.float64]:
        """[T], float64: `alphas_cumprod` for samplers that need a finite sigma / alpha at zero terminal SNR as well."""
        return np.where(self.alphas_cumprod > 0, self.alphas_cumprod, ALMOST_NO_SIGNAL)


def vp_level(timestep: float, alpha_cumprod: float) -> NoiseLevel:
    """The variance-preserving level of a cumulative alpha."""
    return NoiseLevel(float(timestep), math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod))


def spaced_timesteps(
    schedule: Schedule, steps: int, spacing: str, *, whole: bool = True, without_last: bool = False
) -> NDArray[np.float64]:
    """[steps], float64: timesteps that fall strictly through the schedule.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, table 2.

    Args:
        schedule: where they lie.
        steps: how many.
        spacing: one of ``TIMESTEP_SPACINGS``.
        whole: round to whole training steps; else linspace may lie between two.
        without_last: spread one more and leave the last out.

    Raises:
        InputError: `steps` is less than one or more than the schedule has room for.
    """
    length, count = len(schedule), steps + 1 if without_last else steps
    if not 1 <= steps <= length:
        raise InputError(f"{steps} steps were asked for", hint=f"choose 1 to {length}")
    if spacing == "linspace":
        timesteps = np.linspace(0, length - 1, count)[::-1]
    elif spacing == "leading":
        timesteps = np.arange(count, dtype=np.float64)[::-1] * (length // count) + schedule.steps_offset
    else:
        timesteps = np.arange(length, 0, -length / count).round() - 1
    timesteps = timesteps[:steps]  # for some counts, rounding makes arange yield one element too many
    if whole:
        timesteps = timesteps.round()
    if timesteps[0] > length - 1 or bool((np.diff(timesteps) >= 0).any()):
        raise InputError(f"{steps} steps have no room in the model's {length} timesteps", hint="use fewer steps")
    return timesteps
