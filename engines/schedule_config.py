"""Reads a noise schedule from diffusers' ``scheduler_config.json``, and refuses what would silently be ignored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdc.engines.errors import InputError
from sdc.engines.schedule import PREDICTION_TYPES, TIMESTEP_SPACINGS, Schedule

NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,),
    "thresholding": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "lambda_min_clipped": (-math.inf, "-inf", None),
    "variance_type": (None, "fixed_small"),
    "timestep_scaling": (10.0,),
}
"""Options of diffusers' schedulers that change pictures and that sdc does not have, with the values that do nothing."""


def read_schedule(path: Path) -> Schedule:
    """The schedule of a ``scheduler_config.json``.

    Raises:
        InputError: the file cannot be read, or `schedule_from_config` refuses it.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the noise schedule {path}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"expected a JSON object in {path}, found {type(config).__name__}")
    return schedule_from_config(config)


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of any diffusers scheduler's configuration; which scheduler it names does not matter.

    A missing option has the value that diffusers' DDIM, LCM, Euler and DPM-Solver schedulers give it, except that
    ``clip_sample`` counts as off (Stable Diffusion's latents are never clipped).

    Raises:
        InputError: the noise schedule is missing, or an option has a value that changes pictures and is not supported.
    """
    for option, neutral in NEUTRAL_OPTIONS.items():
        if option in config and config[option] not in neutral:
            raise InputError(
                f"the scheduler option {option}={config[option]!r} is not supported",
                hint=f"set it to {neutral[0]!r} in scheduler_config.json if the model works without it",
            )
    prediction_type = _choice(config, "prediction_type", PREDICTION_TYPES, "epsilon")
    spacing = config.get("timestep_spacing")
    if spacing is not None:
        spacing = _choice(config, "timestep_spacing", TIMESTEP_SPACINGS, "leading")
    zero_terminal_snr = bool(config.get("rescale_betas_zero_snr", False))
    if zero_terminal_snr and prediction_type == "epsilon":
        raise InputError(
            "the scheduler option rescale_betas_zero_snr=True is not supported with prediction_type='epsilon'",
            hint="without signal, x0 does not follow from epsilon: the model must predict v or the sample",
        )
    # diffusers works on this table in float32; rounding the betas alike keeps pictures alike.
    alphas = np.float32(1) - _betas(config).astype(np.float32)
    alphas_cumprod = np.cumprod(alphas, dtype=np.float64)
    if zero_terminal_snr:
        alphas_cumprod = rescale_to_zero_terminal_snr(alphas_cumprod)
    return Schedule(
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        steps_offset=int(config.get("steps_offset", 0)),
        final_alpha_cumprod=1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0]),
        original_inference_steps=int(config.get("original_inference_steps", 50)),
    )


def _choice(config: Mapping[str, Any], option: str, choices: tuple[str, ...], default: str) -> str:
    value = config.get(option, default)
    if value not in choices:
        raise InputError(f"the scheduler option {option}={value!r} is not supported", hint=f"use {', '.join(choices)}")
    return str(value)


def _betas(config: Mapping[str, Any]) -> NDArray[np.float64]:
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], np.float64)
    missing = [key for key in ("beta_schedule", "beta_start", "beta_end") if key not in config]
    if missing:
        raise InputError(f"the scheduler configuration lacks {', '.join(missing)}")
    start, end, count = (
        float(config["beta_start"]),
        float(config["beta_end"]),
        int(config.get("num_train_timesteps", 1000)),
    )
    kind = _choice(config, "beta_schedule", ("scaled_linear", "linear", "squaredcos_cap_v2"), "")
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    if kind == "linear":
        return np.linspace(start, end, count)
    return cosine_betas(count)


def cosine_betas(count: int) -> NDArray[np.float64]:
    """Betas of the cosine schedule, at most 0.999.

    Source: Nichol and Dhariwal, "Improved DDPM", arXiv:2102.09672, equation 17.
    """
    time = np.arange(count + 1) / count
    alphas_cumprod = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: NDArray[np.float64] = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    return betas


def rescale_to_zero_terminal_snr(alphas_cumprod: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift and scale the square roots so that the first stays and the last is zero.

    Source: Lin et al., arXiv:2305.08891, algorithm 1.
    """
    root: NDArray[np.float64] = np.sqrt(alphas_cumprod)
    rescaled: NDArray[np.float64] = np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))
    return rescaled
