"""Reading a scheduler_config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler
from torch_pipeline import SD15_SCHEDULE

from sdc.engines.errors import InputError
from sdc.engines.schedule import CLEAN, NoiseLevel, vp_level
from sdc.engines.schedule_config import read_schedule, schedule_from_config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "linear", "num_train_timesteps": 77},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.01, 0.02, 0.4]},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_alphas_equal_diffusers(changes: dict[str, Any]) -> None:
    config = {**SD15_SCHEDULE, **changes}
    theirs = DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    ours = schedule_from_config(config).alphas_cumprod
    assert ours.dtype == np.float64
    # A thousand factors, each rounded to float32; near zero signal, differences of their roots.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9 if "rescale_betas_zero_snr" in changes else 0)


def test_first_and_last_alpha_of_stable_diffusion() -> None:
    schedule = schedule_from_config(SD15_SCHEDULE)
    assert schedule.alphas_cumprod[0] == pytest.approx(1 - 0.00085, abs=1e-7)
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.0046601, rel=1e-5)
    assert schedule.final_alpha_cumprod == schedule.alphas_cumprod[0]


def test_zero_terminal_snr_ends_without_signal() -> None:
    schedule = schedule_from_config({**SD15_SCHEDULE, "rescale_betas_zero_snr": True, "prediction_type": "sample"})
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.positive_alphas_cumprod()[-1] == 2**-24
    assert schedule.level(999) == NoiseLevel(999.0, 0.0, 1.0)


def test_noise_levels() -> None:
    level = vp_level(3, 0.64)
    assert (level.alpha, level.sigma) == pytest.approx((0.8, 0.6))
    assert level.scale == pytest.approx(1)
    assert level.log_snr == pytest.approx(np.log(4 / 3))
    assert NoiseLevel(0.0, 1.0, 2.4).scale == pytest.approx(2.6)
    assert CLEAN.log_snr == float("inf")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip_sample", True),
        ("thresholding", True),
        ("use_karras_sigmas", True),
        ("algorithm_type", "sde-dpmsolver++"),
        ("solver_order", 3),
        ("final_sigmas_type", "sigma_min"),
        ("lambda_min_clipped", -5.1),
        ("timestep_scaling", 5.0),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "quadratic"),
        ("beta_schedule", "sigmoid"),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_unsupported_options_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f"the scheduler option {option}={value!r} is not supported")):
        schedule_from_config({**SD15_SCHEDULE, option: value})


def test_options_that_change_nothing_are_accepted() -> None:
    pndm = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None}
    solver = {"algorithm_type": "dpmsolver++", "lambda_min_clipped": float("-inf"), "use_karras_sigmas": False}
    schedule = schedule_from_config({**SD15_SCHEDULE, **pndm, **solver})
    assert schedule.prediction_type == "epsilon"


def test_missing_betas_are_named() -> None:
    config = {key: value for key, value in SD15_SCHEDULE.items() if key != "beta_end"}
    with pytest.raises(InputError, match="lacks beta_end"):
        schedule_from_config(config)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot read"), ("[]", "expected a JSON object"), (None, "cannot read")]
)
def test_bad_files_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "scheduler_config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=f"{message}.*scheduler_config.json"):
        read_schedule(path)
    path.write_text(json.dumps(SD15_SCHEDULE))
    assert len(read_schedule(path)) == 1000
