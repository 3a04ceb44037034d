"""The consistency loss and its parts against diffusers' schedulers and against formulas in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from sdc.compiler.distill.consistency import (
    Batch,
    Roles,
    boundary_scalings,
    clean_and_noise,
    consistency_function,
    distillation_loss,
    make_solver_grid,
    pseudo_huber,
    solver_step,
)
from sdc.engines.errors import InputError
from sdc.engines.samplers.lcm import plan_lcm
from sdc.engines.schedule import PREDICTION_TYPES
from sdc.engines.schedule_config import schedule_from_config

CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SHAPE = (3, 5, 4, 6)
ROUNDING = 2e-6
"""float32 has 6e-8; what is divided by alpha (0.07 at timestep 999) loses a factor of 15."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_grid_holds_the_timesteps_that_lcm_samples_at() -> None:
    schedule = schedule_from_config(CONFIG)
    grid = make_solver_grid(schedule)
    sampled = [now.timestep for now, _ in plan_lcm(schedule, 50).transitions]
    scheduler = LCMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(50, original_inference_steps=50)
    assert grid.timesteps.flip(0).tolist() == sampled == scheduler.timesteps.tolist()
    assert grid.previous.tolist() == [0, *grid.timesteps[:-1].tolist()]
    torch.testing.assert_close(grid.alpha**2 + grid.sigma**2, torch.ones(50))
    torch.testing.assert_close(grid.alpha**2, scheduler.alphas_cumprod[grid.timesteps])


def test_a_schedule_whose_end_has_no_signal_is_refused_for_epsilon() -> None:
    schedule = schedule_from_config({**CONFIG, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert make_solver_grid(schedule).alpha[-1] == 0
    with pytest.raises(InputError, match="timestep without signal"):
        make_solver_grid(dataclasses.replace(schedule, prediction_type="epsilon"))


def test_more_solver_steps_than_timesteps_are_refused() -> None:
    schedule = dataclasses.replace(schedule_from_config(CONFIG), original_inference_steps=1001)
    with pytest.raises(InputError, match="1001 solver steps have no room in 1000"):
        make_solver_grid(schedule)


def test_scalings_are_those_of_diffusers() -> None:
    timesteps = [0, 1, 19, 39, 499, 999]
    scheduler = LCMScheduler.from_config(CONFIG)
    scheduler.sigma_data = 0.5
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(timestep) for timestep in timesteps]
    found = torch.stack(boundary_scalings(torch.tensor(timesteps)), dim=1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=0)
    assert found[0].tolist() == [1, 0]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_solver_steps_as_ddim_does(prediction_type: str) -> None:
    """DDIM of 50 steps from any timestep goes down by 20, from the last one to the first alpha, as the grid does."""
    scheduler = DDIMScheduler.from_config({**CONFIG, "prediction_type": prediction_type})
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(50)
    grid = make_solver_grid(schedule_from_config(CONFIG))
    steps = torch.tensor([0, 1, 23, 48, 49])
    x, prediction = draw(1, len(steps), *SHAPE[1:]), draw(2, len(steps), *SHAPE[1:])
    clean, noise = clean_and_noise(
        prediction, x, alpha=grid.alpha[steps], sigma=grid.sigma[steps], prediction_type=prediction_type
    )
    found = solver_step(clean, noise, alpha=grid.previous_alpha[steps], sigma=grid.previous_sigma[steps])
    for row, timestep in enumerate(grid.timesteps[steps].tolist()):
        stepped = scheduler.step(prediction[row].double(), timestep, x[row].double())
        wanted = stepped.prev_sample.float()
        torch.testing.assert_close(found[row], wanted, atol=20 * ROUNDING, rtol=20 * ROUNDING)
        original = stepped.pred_original_sample.float()
        torch.testing.assert_close(clean[row], original, atol=20 * ROUNDING, rtol=20 * ROUNDING)


def test_the_consistency_function_is_what_lcm_samples_with() -> None:
    scheduler = LCMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(50, original_inference_steps=50)
    grid = make_solver_grid(schedule_from_config(CONFIG))
    steps = torch.tensor([49, 30, 0])
    x, noise = draw(3, *SHAPE), draw(4, *SHAPE)
    levels = {"alpha": grid.alpha[steps], "sigma": grid.sigma[steps]}
    clean, _ = clean_and_noise(noise, x, **levels, prediction_type="epsilon")
    found = consistency_function(x, clean, grid.timesteps[steps])
    for row, timestep in enumerate(grid.timesteps[steps]):
        scheduler._step_index = None
        wanted = scheduler.step(noise[row], timestep, x[row]).denoised
        torch.testing.assert_close(found[row], wanted, atol=20 * ROUNDING, rtol=20 * ROUNDING)


@pytest.mark.parametrize("width", [0.001, 0.7])
def test_pseudo_huber_is_its_formula(width: float) -> None:
    found, wanted = draw(5, *SHAPE), draw(6, *SHAPE)
    difference = found.double().numpy() - wanted.double().numpy()
    expected = (np.sqrt(difference**2 + width**2) - width).mean()
    assert pseudo_huber(found, wanted, width=width).item() == pytest.approx(expected, rel=1e-5)
    assert pseudo_huber(found, found, width=width).item() == 0


@dataclasses.dataclass
class Linear:
    """A network that depends on everything it is given: a sample · w + b · timestep + c · mean of the states."""

    weight: Tensor

    def __call__(self, sample: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        shift = self.weight[1] * timesteps / 1000 + self.weight[2] * states.mean((1, 2))
        return self.weight[0] * sample + shift[:, None, None, None]


def expected_loss(weights: dict[str, list[float]], batch: Batch, prediction_type: str, width: float) -> float:
    """Algorithm 1 in float64, one picture after the other, with levels from the betas themselves."""
    betas = np.linspace(CONFIG["beta_start"] ** 0.5, CONFIG["beta_end"] ** 0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)

    def network(role: str, x: np.ndarray, timestep: int, states: np.ndarray) -> np.ndarray:
        a, b, c = weights[role]
        return a * x + b * timestep / 1000 + c * states.mean()

    def split(x: np.ndarray, output: np.ndarray, timestep: int) -> tuple[np.ndarray, np.ndarray]:
        alpha, sigma = signal[timestep] ** 0.5, (1 - signal[timestep]) ** 0.5
        if prediction_type == "v_prediction":
            return alpha * x - sigma * output, sigma * x + alpha * output
        clean = (x - sigma * output) / alpha if prediction_type == "epsilon" else output
        return clean, (x - alpha * clean) / sigma

    def consistent(role: str, x: np.ndarray, timestep: int, states: np.ndarray) -> np.ndarray:
        clean, _ = split(x, network(role, x, timestep, states), timestep)
        scaled = 10 * timestep / 0.5
        return x / (scaled**2 + 1) + clean * scaled / (scaled**2 + 1) ** 0.5

    errors = []
    for row in range(len(batch.clean)):
        now = 20 * int(batch.steps[row]) + 19
        then = max(now - 20, 0)
        prompt, empty = (each[row].double().numpy() for each in (batch.conditional, batch.unconditional))
        clean, noise = (each[row].double().numpy() for each in (batch.clean, batch.noise))
        x = signal[now] ** 0.5 * clean + (1 - signal[now]) ** 0.5 * noise
        parts = [split(x, network("teacher", x, now, states), now) for states in (prompt, empty)]
        scale = float(batch.guidance[row])
        guided = [scale * with_prompt + (1 - scale) * without for with_prompt, without in zip(*parts, strict=True)]
        below = signal[then] ** 0.5 * guided[0] + (1 - signal[then]) ** 0.5 * guided[1]
        difference = consistent("student", x, now, prompt) - consistent("target", below, then, prompt)
        errors.append(np.sqrt(difference**2 + width**2) - width)
    return float(np.mean(errors))


def make_batch(seed: int) -> Batch:
    return Batch(
        clean=draw(seed, *SHAPE),
        noise=draw(seed + 1, *SHAPE),
        steps=torch.tensor([0, 17, 49]),
        guidance=torch.tensor([1.0, 1.7, 8.0]),
        conditional=draw(seed + 2, 3, 7, 11),
        unconditional=draw(seed + 3, 1, 7, 11).expand(3, -1, -1),
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_is_that_of_the_paper(prediction_type: str) -> None:
    weights = {"teacher": [0.9, -0.2, 0.3], "target": [0.8, 0.1, -0.4], "student": [0.7, 0.25, 0.15]}
    networks = {role: Linear(torch.tensor(values, requires_grad=True)) for role, values in weights.items()}
    batch = make_batch(20)
    loss = distillation_loss(
        Roles(**networks),
        batch,
        make_solver_grid(schedule_from_config(CONFIG)),
        prediction_type=prediction_type,
        huber_width=0.05,
    )
    assert loss.item() == pytest.approx(expected_loss(weights, batch, prediction_type, 0.05), rel=2e-5)
    loss.backward()
    assert networks["teacher"].weight.grad is None
    assert networks["target"].weight.grad is None
    assert networks["student"].weight.grad is not None
    assert bool((networks["student"].weight.grad != 0).all())


def test_networks_are_called_from_the_teacher_to_the_student() -> None:
    """So that one UNet that plays all three is left as the student, which gradient checkpointing needs."""
    called = []

    def network(role: str) -> object:
        def predict(sample: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
            called.append((role, len(sample), torch.is_grad_enabled()))
            return sample

        return predict

    roles = Roles(**{role: network(role) for role in ("teacher", "target", "student")})  # type: ignore[arg-type]
    grid = make_solver_grid(schedule_from_config(CONFIG))
    distillation_loss(roles, make_batch(30), grid, prediction_type="epsilon", huber_width=0.001)
    assert called == [("teacher", 6, False), ("target", 3, False), ("student", 3, True)]
