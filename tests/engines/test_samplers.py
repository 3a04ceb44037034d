"""Every sampler against diffusers' scheduler, step by step, and against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

from sdc.engines.denoise import DENOISERS
from sdc.engines.errors import InputError
from sdc.engines.noise import noise_from_seeds
from sdc.engines.samplers import SAMPLERS, find_sampler
from sdc.engines.samplers.ddim import plan_ddim_through
from sdc.engines.schedule import NoiseLevel, vp_level
from sdc.engines.schedule_config import schedule_from_config

SHAPE = (3, 5, 7, 9)

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""scheduler_config.json of Stable Diffusion 1.5, which names no timestep spacing."""

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "lcm": LCMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
}


def network(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """A stand-in for the UNet: bounded, nonlinear, and different at every timestep and place."""
    return torch.tanh(0.7 * sample.roll(1, -1) - 0.3 * sample + 0.2 * math.sin(timestep / 97))


def run_diffusers(name: str, config: dict[str, Any], steps: int, seed: int, **step_options: float) -> list[np.ndarray]:
    """The start and the result of every step, as StableDiffusionPipeline goes through them."""
    scheduler = SCHEDULERS[name].from_config(config)
    generator = torch.Generator().manual_seed(seed)
    if name != "lcm":
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(steps, original_inference_steps=config.get("original_inference_steps", 50))
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    trace = [x.numpy()]
    if name in ("ddim", "lcm"):
        step_options["generator"] = generator  # type: ignore[assignment]
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, timestep), float(timestep))
        x = scheduler.step(output, timestep, x, return_dict=False, **step_options)[0]
        trace.append(x.numpy())
    return trace


def run_ours(name: str, config: dict[str, Any], steps: int, seed: int, eta: float = 0.0) -> list[np.ndarray]:
    """The same with our sampler; each step's start is what the step before left, seen by the denoiser."""
    schedule = schedule_from_config(config)
    sampler = find_sampler(name, eta=eta)
    trajectory = sampler.plan(schedule, steps)
    draw_noise = noise_from_seeds([seed])
    trace = []
    denoise = DENOISERS[schedule.prediction_type](lambda sample, t: network(torch.from_numpy(sample), t).numpy())

    def traced(x: np.ndarray, level: Any) -> np.ndarray:
        trace.append(x)
        return denoise(x, level)

    x = draw_noise(SHAPE) * np.float32(trajectory.start_scale)
    trace.append(sampler.sample(traced, x, trajectory.transitions, draw_noise))
    return trace


def assert_equal_traces(ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for index, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.dtype == np.float32
        scale = max(1.0, float(reference.std()))  # Euler's latents begin fifteen times larger
        np.testing.assert_allclose(
            mine / scale, reference / scale, rtol=0, atol=tolerance, err_msg=f"after step {index}"
        )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 4, 20, 33])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_equal_diffusers(name: str, steps: int, prediction_type: str) -> None:
    config = {**SD15, "prediction_type": prediction_type}
    assert_equal_traces(run_ours(name, config, steps, seed=11), run_diffusers(name, config, steps, seed=11))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp-2m"])
def test_spacings_equal_diffusers(name: str, steps: int, spacing: str) -> None:
    config = {**SD15, "timestep_spacing": spacing}
    assert_equal_traces(run_ours(name, config, steps, seed=3), run_diffusers(name, config, steps, seed=3))


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": list(np.linspace(0.0003, 0.02, 1000))},
        {"num_train_timesteps": 700, "set_alpha_to_one": True, "steps_offset": 0},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"original_inference_steps": 25},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_equal_diffusers(name: str, changes: dict[str, Any]) -> None:
    config = {**SD15, **changes}
    # Euler starts zero terminal SNR at sigma 4096, and cosine's at 20,000, in float32.
    steep = "rescale_betas_zero_snr" in changes or changes.get("beta_schedule") == "squaredcos_cap_v2"
    tolerance = 4096 * 2**-23 if steep and name == "euler" else 1e-5
    assert_equal_traces(run_ours(name, config, 6, seed=5), run_diffusers(name, config, 6, seed=5), tolerance)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_ddim_with_noise_equals_diffusers(eta: float, spacing: str) -> None:
    config = {**SD15, "timestep_spacing": spacing}
    theirs = run_diffusers("ddim", config, 9, seed=2, eta=eta)
    assert_equal_traces(run_ours("ddim", config, 9, seed=2, eta=eta), theirs)


@pytest.mark.parametrize("steps", [1, 3, 4, 20, 49, 61, 333])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp-2m"])
def test_timesteps_equal_diffusers(name: str, steps: int, spacing: str) -> None:
    config = {**SD15, "timestep_spacing": spacing}
    scheduler = SCHEDULERS[name].from_config(config)
    scheduler.set_timesteps(steps)
    transitions = SAMPLERS[name].plan(schedule_from_config(config), steps).transitions
    # For 61 steps trailing spacing gives diffusers a 62nd timestep, -1: a rounding error that we do not repeat.
    np.testing.assert_allclose([now.timestep for now, _ in transitions], scheduler.timesteps[:steps], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_ddim_goes_through_the_timesteps_that_it_is_given(steps: int) -> None:
    schedule = schedule_from_config(SD15)
    usual = SAMPLERS["ddim"].plan(schedule, steps).transitions
    given = plan_ddim_through(schedule, [int(now.timestep) for now, _ in usual]).transitions
    assert [now for now, _ in given] == [now for now, _ in usual]
    assert [(then.alpha, then.sigma) for _, then in given] == [(then.alpha, then.sigma) for _, then in usual]


def test_known_timesteps() -> None:
    schedule = schedule_from_config(SD15)
    ddim = [now.timestep for now, _ in SAMPLERS["ddim"].plan(schedule, 50).transitions]
    assert ddim[:2] == [981, 961]
    assert ddim[-1] == 1
    assert [now.timestep for now, _ in SAMPLERS["lcm"].plan(schedule, 4).transitions] == [999, 759, 499, 259]


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "euler"])
def test_one_point_of_data_is_reached_exactly(name: str) -> None:
    """If x0 is known, the exact flow is a straight line in (alpha, sigma), which every sampler follows at any step."""
    config = {**SD15, "set_alpha_to_one": True}
    x0 = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    sampler = SAMPLERS[name]
    trajectory = sampler.plan(schedule_from_config(config), 5)
    noise = noise_from_seeds([4])(SHAPE)
    seen = []

    def denoise(x: np.ndarray, level: Any) -> np.ndarray:
        seen.append((x, level))
        return x0

    first = trajectory.transitions[0][0]
    start = (first.alpha * x0 + first.sigma * noise).astype(np.float32)
    result = sampler.sample(denoise, start, trajectory.transitions, noise_from_seeds([0]))
    assert len(seen) == 5
    for x, level in seen:
        np.testing.assert_allclose(x, level.alpha * x0 + level.sigma * noise, rtol=0, atol=2e-5)
    np.testing.assert_allclose(result, x0, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("dpmpp-2m", 2)])
def test_errors_fall_with_the_order_of_the_sampler(name: str, order: int) -> None:
    """Data N(0, s^2) has a known flow: x keeps its place in standard deviations while these go with the noise level."""
    spread = 0.6
    noise = noise_from_seeds([9])(SHAPE)

    def level(log_snr: float) -> NoiseLevel:
        sigma = math.exp(-log_snr)
        return NoiseLevel(0.0, 1.0, sigma) if name == "euler" else vp_level(0.0, 1 / (1 + sigma**2))

    def deviation(level: NoiseLevel) -> float:
        return math.hypot(level.alpha * spread, level.sigma)

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        return (level.alpha * spread**2 / deviation(level) ** 2) * x

    def error(steps: int) -> float:
        levels = [level(log_snr) for log_snr in np.linspace(-2.5, 2.0, steps + 1)]
        start = noise * np.float32(deviation(levels[0]))
        end = SAMPLERS[name].sample(denoise, start, tuple(pairwise(levels)), noise_from_seeds([0]))
        return float(np.abs(end - noise * np.float32(deviation(levels[-1]))).max())

    growth = error(16) / error(64)
    assert 0.6 * 4**order < growth < 1.6 * 4**order


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("ddim", 0),
        ("ddim", 1000),  # leading spacing with an offset of 1 would begin at timestep 1000
        ("ddim", 1001),
        ("euler", -1),
        ("euler", 1001),
        ("lcm", 0),
        ("lcm", 51),
        ("dpmpp-2m", 0),
        ("dpmpp-2m", 1000),
        ("dpmpp-2m", 2000),
    ],
)
def test_too_many_or_too_few_steps_are_refused(name: str, steps: int) -> None:
    with pytest.raises(InputError, match=f"^{steps} steps"):
        SAMPLERS[name].plan(schedule_from_config({**SD15, "timestep_spacing": "leading"}), steps)


@pytest.mark.parametrize(
    ("name", "eta", "message"),
    [
        ("heun", 0.0, "unknown sampler 'heun'; choose from ddim, lcm"),
        ("euler", 0.5, "only ddim"),
        ("ddim", 1.5, "0 to 1"),
    ],
)
def test_find_sampler_refuses(name: str, eta: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_sampler(name, eta=eta)
