"""What a LoRA can learn: to draw in few steps, or what the pictures look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sdc.compiler.distill.consistency import Batch, Roles, clean_and_noise, distillation_loss, make_solver_grid
from sdc.compiler.distill.settings import DENOISING, DistillSettings
from sdc.compiler.lora_argument import CONSISTENCY
from sdc.engines.schedule import Schedule

MIN_SNR_GAMMA = 5.0
"""Source: Hang et al., arXiv:2303.09556, section 3.4."""


class Objective(Protocol):
    """A loss, and the noise levels that it is taken at.

    Attributes:
        levels: their number; `Batch.steps` are indices into them.
        preview: name of the sampler and number of steps of each column of a grid of pictures.
    """

    levels: int
    preview: tuple[tuple[str, int], ...]

    def loss(self, roles: Roles, batch: Batch) -> Tensor:
        """Of one batch, a scalar; its gradient reaches the student alone."""


class ConsistencyObjective:
    """The student says where a trajectory of the teacher's ends; levels are those of the teacher's solver."""

    preview: tuple[tuple[str, int], ...] = (("lcm", 1), ("lcm", 2), ("lcm", 4), ("lcm", 8))

    def __init__(self, schedule: Schedule, settings: DistillSettings, device: torch.device) -> None:
        self._grid = make_solver_grid(schedule).to(device)
        self._prediction_type = schedule.prediction_type
        self._huber_width = settings.huber_width
        self.levels = len(self._grid)

    def loss(self, roles: Roles, batch: Batch) -> Tensor:
        """See `distillation_loss`."""
        return distillation_loss(
            roles, batch, self._grid, prediction_type=self._prediction_type, huber_width=self._huber_width
        )


class DenoisingObjective:
    """The student finds the clean latent, as any diffusion model does; levels are all of the schedule's timesteps.

    The squared error of the clean latent weighs min(SNR, 5): min-SNR (arXiv:2303.09556, equation 8), which for a
    network that predicts noise is the squared error of that times min(SNR, 5) / SNR.
    """

    preview: tuple[tuple[str, int], ...] = (("ddim", 10), ("ddim", 20))

    def __init__(self, schedule: Schedule, settings: DistillSettings, device: torch.device) -> None:
        del settings
        signal = torch.from_numpy(schedule.positive_alphas_cumprod()).to(device)
        self._alpha, self._sigma = signal.sqrt().float(), (1 - signal).sqrt().float()
        self._weight = (signal / (1 - signal)).clamp(max=MIN_SNR_GAMMA).float()
        self._prediction_type = schedule.prediction_type
        self.levels = len(schedule)

    def loss(self, roles: Roles, batch: Batch) -> Tensor:
        """Weighted mean of the squared errors."""
        levels = {"alpha": self._alpha[batch.steps], "sigma": self._sigma[batch.steps]}
        alpha, sigma = (each[:, None, None, None] for each in levels.values())
        x = alpha * batch.clean + sigma * batch.noise
        predicted = roles.student(x, batch.steps, batch.conditional).float()
        clean, _ = clean_and_noise(predicted, x, **levels, prediction_type=self._prediction_type)
        errors = (clean - batch.clean).square().mean((1, 2, 3))
        return (self._weight[batch.steps] * errors).mean()


OBJECTIVES: dict[str, Callable[[Schedule, DistillSettings, torch.device], Objective]] = {
    CONSISTENCY: ConsistencyObjective,
    DENOISING: DenoisingObjective,
}
"""By their names in `DistillSettings.objective`."""
