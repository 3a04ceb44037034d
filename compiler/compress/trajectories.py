"""Latents on their way from noise to pictures, as a network draws them, with what it predicts there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdc.compiler.compress.probes import Probe
from sdc.engines.denoise import DENOISERS, Latents, guide
from sdc.engines.noise import noise_from_seeds
from sdc.engines.samplers import find_sampler
from sdc.engines.schedule import Schedule

SAMPLER = "ddim"


@torch.no_grad()
def denoise(
    network: UNet2DConditionModel,
    schedule: Schedule,
    states: Tensor,
    *,
    seed: int,
    size: tuple[int, ...],
    steps: int,
    guidance_scale: float,
) -> tuple[Latents, list[Probe]]:
    """One picture's latents, [1, C, H, W], and the inputs and the answer of every step, without guidance.

    Args:
        network: draws.
        schedule: of the model.
        states: [2, T, D]: of the empty prompt and of the picture's.
        seed: of the noise.
        size: (C, H, W).
        steps: of DDIM.
        guidance_scale: 1 is none.
    """
    seen = []

    def predict(sample: Latents, timestep: float) -> Latents:
        timesteps = torch.full((len(sample),), round(timestep), device=states.device)
        inputs = torch.from_numpy(np.ascontiguousarray(sample)).to(states.device)
        answer = network(inputs, timesteps, states).sample.float()
        seen.append(Probe(inputs[1:], timesteps[1:], states[1:], answer[1:]))
        return np.asarray(answer.cpu().numpy())

    sampler, draw_noise = find_sampler(SAMPLER), noise_from_seeds([seed])
    trajectory = sampler.plan(schedule, steps)
    x = draw_noise((1, *size)) * trajectory.transitions[0][0].scale
    denoised = DENOISERS[schedule.prediction_type](guide(predict, guidance_scale))
    latents = sampler.sample(denoised, x, trajectory.transitions, draw_noise).astype(np.float32)
    return latents, seen


def probe_of_prompts(
    teacher: UNet2DConditionModel,
    schedule: Schedule,
    states: Tensor,
    *,
    size: tuple[int, ...],
    steps: int,
    guidance_scale: float,
    tell: Callable[[str], None],
) -> Probe:
    """What the teacher sees and predicts as it draws a picture of each prompt: `steps` neighbouring rows of each.

    Args:
        teacher: its predictions are the truth.
        schedule: of the model.
        states: [P + 1, T, D], of the prompts and, last, of the empty one.
        size: (C, H, W) of the latents.
        steps: of DDIM.
        guidance_scale: 1 is none.
        tell: receives a line for each prompt.
    """
    rows: list[Probe] = []
    for prompt in range(len(states) - 1):
        tell(f"teacher's picture {prompt + 1} of {len(states) - 1}")
        drawing: dict[str, Any] = {"seed": prompt, "size": size, "steps": steps, "guidance_scale": guidance_scale}
        rows += denoise(teacher, schedule, states[[-1, prompt]], **drawing)[1]
    return join_probes(rows)


def join_probes(probes: Sequence[Probe]) -> Probe:
    """One of all rows."""
    columns = zip(*(vars(probe).values() for probe in probes), strict=True)
    return Probe(*(torch.cat(column) for column in columns))
