"""What importance, sensitivity and quality are measured on: noisy latents with their captions, over all timesteps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """Inputs of a UNet with what it should answer.

    Attributes:
        sample: [B, C, H, W], float32: clean latents with the timestep's share of noise.
        timesteps: [B], int64.
        states: [B, T, D]: of the captions.
        truth: [B, C, H, W]: noise, v or latent, whichever the network predicts.
    """

    sample: Tensor
    timesteps: Tensor
    states: Tensor
    truth: Tensor

    def __len__(self) -> int:
        return len(self.sample)

    def split(self, rows: int) -> Iterator[Probe]:
        """Parts of at most `rows` rows."""
        parts = [tensor.split(rows) for tensor in vars(self).values()]
        return (Probe(*part) for part in zip(*parts, strict=True))


def make_probe(
    clean: Tensor, noise: Tensor, timesteps: Tensor, states: Tensor, *, signal: Tensor, prediction_type: str
) -> Probe:
    """The forward process (Ho et al., arXiv:2006.11239, equation 4) and the network's target.

    Args:
        clean: [B, C, H, W], float32; `noise` likewise.
        noise: of unit variance.
        timesteps: [B], int64.
        states: [B, T, D].
        signal: alphas_cumprod of the schedule, [T].
        prediction_type: one of `sdc.engines.schedule.PREDICTION_TYPES`.
    """
    level = signal[timesteps][:, None, None, None]
    alpha, sigma = level.sqrt().float(), (1 - level).sqrt().float()
    sample = alpha * clean + sigma * noise
    truths = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}
    return Probe(sample, timesteps, states, truths[prediction_type])


def spread_timesteps(count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` timesteps evenly over a schedule of `length`, in random order: [count], int64."""
    evenly = ((torch.arange(count) + 0.5) * length / count).long()
    return evenly[torch.randperm(count, generator=generator)]
