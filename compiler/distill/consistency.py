"""The loss of latent consistency distillation, in pure functions of tensors.

Source: Luo et al., "Latent Consistency Models", arXiv:2310.04378, algorithm 1. A student learns to say, from any latent
on a trajectory of the teacher's probability-flow ODE, where that trajectory ends: it has to agree with its own average
(the target) one solver step further down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdc.engines.errors import InputError
from sdc.engines.samplers.lcm import SIGMA_DATA, TIMESTEP_SCALING
from sdc.engines.schedule import Schedule

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A network in its own terms: (sample [B, C, H, W], timesteps [B], encoder_hidden_states [B, T, D]) -> [B, C, H, W]."""


@dataclass(frozen=True)
class SolverGrid:
    """The steps of the teacher's solver: from each timestep down to the one before it.

    Attributes:
        timesteps: [N], int64, rising; the student learns at these, and `plan_lcm` samples at these.
        previous: [N], int64: where each step leads to; the first leads to timestep 0.
        alpha: [N], float32: factor of the clean latent at ``timesteps``; likewise ``sigma`` of the noise.
        previous_alpha: [N], float32, at ``previous``; likewise ``previous_sigma``.
    """

    timesteps: Tensor
    previous: Tensor
    alpha: Tensor
    sigma: Tensor
    previous_alpha: Tensor
    previous_sigma: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device) -> SolverGrid:
        """The same on another device."""
        return SolverGrid(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Batch:
    """What one optimiser step learns from.

    Attributes:
        clean: [B, C, H, W], float32: latents of pictures.
        noise: [B, C, H, W], float32.
        steps: [B], int64: indices into the solver's grid.
        guidance: [B], float32: the teacher's guidance scale; 1 is none.
        conditional: [B, T, D]: the captions' states; likewise ``unconditional`` of the empty caption.
    """

    clean: Tensor
    noise: Tensor
    steps: Tensor
    guidance: Tensor
    conditional: Tensor
    unconditional: Tensor


@dataclass(frozen=True)
class Roles:
    """The three networks, called in this order: the teacher, the target without gradient, and the student."""

    teacher: Predict
    target: Predict
    student: Predict


def make_solver_grid(schedule: Schedule) -> SolverGrid:
    """Every k-th timestep of the schedule, k = T / its ``original_inference_steps``: 19, 39, ... 999 for SD.

    Raises:
        InputError: the schedule is not of that many timesteps, or has no signal at one of them.
    """
    count = schedule.original_inference_steps
    if not 1 <= count <= len(schedule):
        raise InputError(f"{count} solver steps have no room in {len(schedule)} timesteps")
    skip = len(schedule) // count
    timesteps = torch.arange(1, count + 1) * skip - 1
    previous = (timesteps - skip).clamp(min=0)
    signal = torch.from_numpy(schedule.alphas_cumprod.copy())
    if schedule.prediction_type == "epsilon" and not bool((signal[timesteps] > 0).all()):
        raise InputError("the schedule has a timestep without signal, from which noise says nothing of the picture")

    def levels(of: Tensor) -> tuple[Tensor, Tensor]:
        return signal[of].sqrt().float(), (1 - signal[of]).sqrt().float()

    return SolverGrid(timesteps, previous, *levels(timesteps), *levels(previous))


def boundary_scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of the consistency function, of the timesteps' shape: 1 and 0 at timestep 0.

    Source: the paper's appendix C, with diffusers' scaling of timesteps; as the runtime's sampler has them.
    """
    time = TIMESTEP_SCALING * timesteps.float()
    return SIGMA_DATA**2 / (time**2 + SIGMA_DATA**2), time / (time**2 + SIGMA_DATA**2).sqrt()


def clean_and_noise(
    prediction: Tensor, x: Tensor, *, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """What the network believes x = alpha x0 + sigma epsilon to consist of.

    Args:
        prediction: the network's output, [B, C, H, W]; `x` likewise.
        x: the noisy latent.
        alpha: [B]; `sigma` likewise, with alpha² + sigma² = 1.
        sigma: of x.
        prediction_type: one of `sdc.engines.schedule.PREDICTION_TYPES`.

    Returns:
        x0 and epsilon.
    """
    alpha, sigma = _beside(alpha), _beside(sigma)
    if prediction_type == "epsilon":
        return (x - sigma * prediction) / alpha, prediction
    if prediction_type == "v_prediction":
        return alpha * x - sigma * prediction, alpha * prediction + sigma * x
    return prediction, (x - alpha * prediction) / sigma


def solver_step(clean: Tensor, noise: Tensor, *, alpha: Tensor, sigma: Tensor) -> Tensor:
    """DDIM's step (arXiv:2010.02502, equation 12, eta 0) to the level `alpha` [B], `sigma` [B]."""
    return _beside(alpha) * clean + _beside(sigma) * noise


def consistency_function(x: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
    """c_skip x + c_out x0, the student's answer; `timesteps` [B]."""
    c_skip, c_out = boundary_scalings(timesteps)
    return _beside(c_skip) * x + _beside(c_out) * clean


def pseudo_huber(found: Tensor, wanted: Tensor, *, width: float) -> Tensor:
    """Mean over all values of sqrt(d² + width²) - width: squared below `width`, absolute above.

    Source: Song and Dhariwal, arXiv:2310.14189, section 3.3; value by value, as diffusers' LCM training has it.
    """
    return (((found.float() - wanted.float()) ** 2 + width**2).sqrt() - width).mean()


def distillation_loss(
    roles: Roles, batch: Batch, grid: SolverGrid, *, prediction_type: str, huber_width: float
) -> Tensor:
    """The loss of one batch; its gradient reaches the student alone.

    The student is called last, so that one network can play all three roles: a backward pass that computes
    activations anew (gradient checkpointing) finds it as the student left it.
    """
    alpha, sigma = grid.alpha[batch.steps], grid.sigma[batch.steps]
    timesteps, previous = grid.timesteps[batch.steps], grid.previous[batch.steps]
    lower = {"alpha": grid.previous_alpha[batch.steps], "sigma": grid.previous_sigma[batch.steps]}
    x = solver_step(batch.clean, batch.noise, alpha=alpha, sigma=sigma)
    with torch.no_grad():
        guided = guided_prediction(roles.teacher, x, timesteps, batch)
        clean, noise = clean_and_noise(guided, x, alpha=alpha, sigma=sigma, prediction_type=prediction_type)
        x_previous = solver_step(clean, noise, **lower)
        target = roles.target(x_previous, previous, batch.conditional).float()
        clean, _ = clean_and_noise(target, x_previous, **lower, prediction_type=prediction_type)
        wanted = consistency_function(x_previous, clean, previous)
    predicted = roles.student(x, timesteps, batch.conditional).float()
    clean, _ = clean_and_noise(predicted, x, alpha=alpha, sigma=sigma, prediction_type=prediction_type)
    return pseudo_huber(consistency_function(x, clean, timesteps), wanted, width=huber_width)


def guided_prediction(teacher: Predict, x: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
    """The teacher's prediction with classifier-free guidance (arXiv:2207.12598, with Imagen's weight).

    x0 and epsilon are affine in the prediction, so that guiding it is guiding both.
    """
    states = torch.cat([batch.conditional, batch.unconditional])
    both = teacher(torch.cat([x, x]), torch.cat([timesteps, timesteps]), states).float()
    conditional, unconditional = both.chunk(2)
    return unconditional + _beside(batch.guidance) * (conditional - unconditional)


def _beside(factors: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return factors[:, None, None, None]
