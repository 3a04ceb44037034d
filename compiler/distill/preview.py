"""A grid of pictures that the student draws while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdc.compiler.distill.consistency import Predict
from sdc.compiler.evaluate.grid import draw_grid
from sdc.engines.denoise import DENOISERS, Latents
from sdc.engines.noise import noise_from_seeds
from sdc.engines.picture import save_png
from sdc.engines.samplers import SAMPLERS
from sdc.engines.schedule import Schedule

Painter = tuple[Predict, AutoencoderKL, Schedule]
"""The network, the autoencoder and the schedule to draw with."""


@torch.no_grad()
def save_preview(
    path: Path,
    painter: Painter,
    *,
    columns: Sequence[tuple[str, int]],
    prompts: Sequence[str],
    states: Tensor,
    size: tuple[int, ...],
) -> None:
    """Draw each prompt in several ways from one seed, without guidance, and write the grid as PNG.

    Args:
        path: of the grid.
        painter: what draws.
        columns: name of the sampler and number of steps of each.
        prompts: beside the rows.
        states: [P, T, D], of the prompts.
        size: (C, H, W) of the latents.
    """
    network, vae, schedule = painter

    def predict(sample: Latents, timestep: float) -> Latents:
        timesteps = torch.full((len(sample),), round(timestep), device=states.device)
        prediction = network(torch.from_numpy(np.ascontiguousarray(sample)).to(states.device), timesteps, states)
        return prediction.float().cpu().numpy()

    denoise = DENOISERS[schedule.prediction_type](predict)
    drawn = []
    for name, steps in columns:
        sampler, draw_noise = SAMPLERS[name], noise_from_seeds(list(range(len(prompts))))
        trajectory = sampler.plan(schedule, steps)
        x = trajectory.start_scale * draw_noise((len(prompts), *size))
        latents = sampler.sample(denoise, x, trajectory.transitions, draw_noise).astype(np.float32)
        drawn.append(np.concatenate([decode(vae, latents[i : i + 1], states.device) for i in range(len(prompts))]))
    save_png(draw_grid(list(prompts), [np.stack(drawn, axis=1)]), path)


def decode(vae: AutoencoderKL, latents: Latents, device: torch.device) -> Latents:
    """Pictures [N, 3, H, W] in [0, 1]."""
    scaled = torch.from_numpy(latents).to(device) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    pictures = vae.decode(scaled).sample.float().cpu().numpy()
    return np.asarray((pictures / 2 + 0.5).clip(0, 1), np.float32)
