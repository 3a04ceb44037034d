"""A grid of pictures: the teacher's on the left, the student's of the same noise on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from sdc.compiler.compress.trajectories import denoise
from sdc.compiler.distill.preview import decode
from sdc.compiler.evaluate.grid import draw_grid
from sdc.engines.denoise import Latents
from sdc.engines.picture import save_png
from sdc.engines.schedule import Schedule

STEPS, PICTURES = 20, 2
"""PICTURES is of each prompt and network."""


@torch.no_grad()
def save_side_by_side(
    path: Path,
    networks: Sequence[UNet2DConditionModel],
    vae: AutoencoderKL,
    schedule: Schedule,
    *,
    prompts: Sequence[str],
    states: Tensor,
    size: tuple[int, ...],
    guidance_scale: float,
) -> None:
    """Write the grid as PNG.

    Args:
        path: of the grid.
        networks: columns from left to right.
        vae: decodes.
        schedule: of the model.
        prompts: beside the rows.
        states: [P + 1, T, D], of the prompts and, last, of the empty one.
        size: (C, H, W) of the latents.
        guidance_scale: 1 is none.
    """
    blocks = []
    for network in networks:
        columns = []
        for number in range(PICTURES):
            rows = [
                _draw(network, vae, schedule, states[[-1, row]], seed=number, size=size, guidance_scale=guidance_scale)
                for row in range(len(prompts))
            ]
            columns.append(np.concatenate(rows))
        blocks.append(np.stack(columns, axis=1))
    save_png(draw_grid(list(prompts), blocks), path)


def _draw(
    network: UNet2DConditionModel,
    vae: AutoencoderKL,
    schedule: Schedule,
    states: Tensor,
    *,
    seed: int,
    size: tuple[int, ...],
    guidance_scale: float,
) -> Latents:
    """One picture, [1, 3, H, W] in [0, 1]; `states` are [unconditional, conditional]."""
    latents, _ = denoise(network, schedule, states, seed=seed, size=size, steps=STEPS, guidance_scale=guidance_scale)
    return decode(vae, latents, states.device)
