"""How well a UNet predicts the noise of latents that no training has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdc.compiler.evaluate.epsilon import EpsilonRow, PredictNoise, epsilon_rows
from sdc.engines.schedule import Schedule


@dataclass(frozen=True)
class Quality:
    """A student beside its teacher, on held-out latents.

    Attributes:
        student_loss: mean squared error of the prediction against the truth, over all timesteps; ``teacher_loss``
            likewise.
        rows: the same at single timesteps, with the difference of the two predictions.
    """

    student_loss: float
    teacher_loss: float
    rows: tuple[EpsilonRow, ...]

    @property
    def student_snr_db(self) -> float:
        """Of the prediction, whose truth has unit variance if it is noise; 10 log10 of 1 / error."""
        return -10 * math.log10(self.student_loss)

    @property
    def lost_db(self) -> float:
        """By how much the student's SNR is below the teacher's."""
        return 10 * math.log10(self.student_loss / self.teacher_loss)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "student_snr_db": self.student_snr_db,
            "lost_db": self.lost_db,
            "timesteps": [
                {
                    "timestep": row.timestep,
                    "lost_db": 10 * math.log10(row.bundle_loss / (row.reference_loss or math.nan)),
                    "difference_from_teacher": row.error,
                }
                for row in self.rows
            ],
        }


@torch.no_grad()
def measure_quality(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    *,
    latents: Tensor,
    states: Tensor,
    schedule: Schedule,
    rows: int,
    seed: int,
) -> Quality:
    """Predict at evenly spread timesteps.

    Args:
        student: on the states' device, as the teacher.
        teacher: gets the same inputs.
        latents: [N, C, H, W], float32, clean.
        states: [N, T, D]: of their captions.
        schedule: of the model.
        rows: at a time.
        seed: of the noise.
    """
    found = epsilon_rows(
        _predict(student, states, rows),
        _predict(teacher, states, rows),
        latents=latents.numpy(),
        encoder_hidden_states=states.cpu().numpy(),
        schedule=schedule,
        seed=seed,
    )
    return Quality(_mean([row.bundle_loss for row in found]), _mean([row.reference_loss for row in found]), found)


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _predict(unet: UNet2DConditionModel, states: Tensor, rows: int) -> PredictNoise:
    def predict(sample: np.ndarray, timestep: float, _: np.ndarray) -> np.ndarray:
        parts = zip(torch.from_numpy(sample).to(states.device).split(rows), states.split(rows), strict=True)
        time = torch.tensor([timestep], device=states.device)
        answers = [unet(part, time.expand(len(part)), its_states).sample for part, its_states in parts]
        return torch.cat(answers).float().cpu().numpy()

    return predict
