"""A whole picture from three networks: DDIM with classifier-free guidance, in NumPy.

It runs in the peers' environments. The loop itself costs milliseconds: all of the time is the peers'.

Source: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", equation 12, eta 0; Ho, Salimans, "Classifier-Free
Diffusion Guidance", equation 6. Timesteps and the last alpha are those of diffusers' DDIMScheduler for SD 1.5.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peers.protocol import COMPONENTS, PICTURE, Job, Measured, Run, Work, repeated


def work_from_networks(job: Job, load: Callable[[Job, str], Run]) -> Work:
    """The work of a job, for a side that gives the networks one by one.

    Args:
        job: of a component, or of a whole picture.
        load: opens a network.
    """
    if job.component != PICTURE:
        return repeated(load(job, job.component), job.feeds(job.component))
    networks = {component: load(job, component) for component in COMPONENTS}
    return drawing(job, networks)


def drawing(job: Job, networks: Mapping[str, Run]) -> Work:
    """Whole pictures, from token ids and noise to pixels."""
    feeds = job.feeds(PICTURE)
    folder = Path(job.checkpoint)
    alphas_cumprod = alphas_from_config(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    scaling_factor = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]

    def work(calls: int, steps: int) -> Measured:
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter()
            states = networks["text_encoder"]({"input_ids": feeds["input_ids"]})
            first_step, latents = denoise(
                networks["unet"], feeds["latents"], states, alphas_cumprod, steps, job.picture["guidance_scale"]
            )
            picture = networks["vae_decoder"]({"latent_sample": latents / np.float32(scaling_factor)})
            seconds.append(time.perf_counter() - begin)
        return Measured(seconds, picture, first_step)

    return work


def denoise(
    unet: Run, latents: np.ndarray, states: np.ndarray, alphas_cumprod: np.ndarray, steps: int, guidance_scale: float
) -> tuple[tuple[float, float], np.ndarray]:
    """DDIM.

    Args:
        unet: predicts noise for two rows, the unconditional one first.
        latents: [1, C, H, W], float32: noise.
        states: [2, 77, D], float32: of the empty prompt, of the prompt.
        alphas_cumprod: [1000], float64.
        steps: of the sampler.
        guidance_scale: weight of the guidance.

    Returns:
        When the first step began and was done (`time.monotonic()`), and the clean latents.
    """
    spacing = len(alphas_cumprod) // steps
    first_step = None
    for timestep in (np.arange(steps) * spacing + 1)[::-1]:
        begin = time.monotonic()
        both = {
            "sample": np.concatenate([latents, latents]),
            "timestep": np.array([timestep], np.float32),
            "encoder_hidden_states": states,
        }
        unconditional, conditional = np.split(unet(both), 2)
        first_step = first_step or (begin, time.monotonic())
        noise = unconditional + np.float32(guidance_scale) * (conditional - unconditional)
        now, then = alphas_cumprod[timestep], alphas_cumprod[max(timestep - spacing, 0)]
        clean = (latents - np.float32(np.sqrt(1 - now)) * noise) / np.float32(np.sqrt(now))
        latents = np.float32(np.sqrt(then)) * clean + np.float32(np.sqrt(1 - then)) * noise
    assert first_step is not None
    return first_step, latents


def alphas_from_config(config: Mapping[str, Any]) -> np.ndarray:
    """Cumulated alphas of a scheduler's configuration: [1000], float64.

    Raises:
        ValueError: it is another schedule than Stable Diffusion 1.5's.
    """
    expected = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon", "steps_offset": 1}
    found = {name: config.get(name) for name in expected}
    if found != expected:
        raise ValueError(f"expected a scheduler with {expected}, found {found}")
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"]) ** 2
    return np.cumprod(1 - betas)
