"""Where along the denoising a UNet differs: its error at each timestep, on the very inputs that the reference gets.

Finer than any picture: no sampler, guidance or decoder stands between the networks and the figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdc.compiler.evaluate.seed_noise import seed_noise
from sdc.engines.schedule import NoiseLevel, Schedule

PredictNoise = Callable[[np.ndarray, float, np.ndarray], np.ndarray]
"""A UNet: (sample [N, C, H, W], timestep, encoder_hidden_states [N, 77, D]) -> its raw prediction, like the sample."""

TIMESTEPS = 10


@dataclass(frozen=True)
class EpsilonRow:
    """One timestep.

    Attributes:
        timestep: in training steps.
        error: root mean square of the difference of the two predictions over that of the reference's; None without one.
        noise: standard deviation of ``error`` over seeds.
        bundle_loss: mean squared error of the bundle's prediction against the truth; likewise ``reference_loss``.
    """

    timestep: int
    error: float | None
    noise: float | None
    bundle_loss: float
    reference_loss: float | None


def epsilon_rows(
    bundle: PredictNoise,
    reference: PredictNoise | None,
    *,
    latents: np.ndarray,
    encoder_hidden_states: np.ndarray,
    schedule: Schedule,
    seed: int,
    timesteps: int = TIMESTEPS,
) -> tuple[EpsilonRow, ...]:
    """Errors at evenly spread timesteps, from little noise to much.

    Args:
        bundle: the UNet that is evaluated.
        reference: the one that it is compared with.
        latents: [N, C, H, W], float32, clean, in the UNet's scale.
        encoder_hidden_states: [N, 77, D], float32, of the latents' prompts; the same for both networks.
        schedule: gives the noise at each timestep and what the network predicts.
        seed: of the noise.
        timesteps: how many, each in the middle of its share of the schedule.
    """
    random = np.random.default_rng(seed)
    rows = []
    for timestep in ((np.arange(timesteps) + 0.5) * len(schedule) / timesteps).astype(int):
        level = schedule.level(int(timestep))
        noise = random.standard_normal(latents.shape, np.float32)
        sample = (level.alpha * latents + level.sigma * noise).astype(np.float32)
        wanted = _truth(schedule.prediction_type, level, latents, noise)
        found = bundle(sample, float(timestep), encoder_hidden_states)
        other = None if reference is None else reference(sample, float(timestep), encoder_hidden_states)
        rows.append(_row(int(timestep), found, other, wanted))
    return tuple(rows)


def _truth(prediction_type: str, level: NoiseLevel, latents: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """What a perfect network would predict if it knew the noise."""
    if prediction_type == "epsilon":
        return noise
    return latents if prediction_type == "sample" else level.alpha * noise - level.sigma * latents


def _row(timestep: int, found: np.ndarray, other: np.ndarray | None, truth: np.ndarray) -> EpsilonRow:
    loss = float(_squares(found - truth).mean())
    if other is None:
        return EpsilonRow(timestep, None, None, loss, None)
    differences, scales = _squares(found - other), _squares(other)

    def error(index: np.ndarray) -> dict[str, float]:
        return {"error": float(np.sqrt(differences[index].sum() / scales[index].sum()))}

    everything = np.arange(len(found))
    return EpsilonRow(
        timestep=timestep,
        error=error(everything)["error"],
        noise=seed_noise(error, len(found)).get("error"),
        bundle_loss=loss,
        reference_loss=float(_squares(other - truth).mean()),
    )


def _squares(tensor: np.ndarray) -> np.ndarray:
    """Mean square of each row of [N, ...], float64."""
    return np.asarray(np.square(tensor, dtype=np.float64).reshape(len(tensor), -1).mean(axis=1))
