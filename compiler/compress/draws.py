"""What a compression draws from its pictures: probes, batches of recovery, and the latents that it keeps apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdc.compiler.compress.probes import Probe, make_probe, spread_timesteps
from sdc.compiler.compress.recovery import PAIRED_SHARE, RecoveryBatch
from sdc.compiler.compress.settings import CompressSettings
from sdc.compiler.distill.training_data import TrainingData
from sdc.engines.errors import InputError
from sdc.engines.schedule import Schedule

PROBE_STEP = 1 << 40
"""Steps from here on are draws of probes, so that no training step has the same."""

HELD_OUT_SHARE = 20
"""One picture in so many is kept from training, for quality; at most as many as a probe has rows."""


class Draws:
    """Draws of one run, each from generators of its own.

    Args:
        data: latents and captions.
        settings: of the run.
        schedule: of the model.

    Raises:
        InputError: quality decides on ranks, and there are too few pictures to hold any out.
    """

    def __init__(self, data: TrainingData, settings: CompressSettings, schedule: Schedule) -> None:
        self.data = data
        self._settings, self._schedule = settings, schedule
        self._signal = torch.from_numpy(schedule.alphas_cumprod.copy())
        self.held_out = min(settings.probe_rows, len(data.pictures) // HELD_OUT_SHARE)
        if settings.has_rank_budget and not self.held_out:
            raise InputError(
                f"a budget of ranks is measured on pictures that are held out, one in {HELD_OUT_SHARE}, and there are "
                f"{len(data.pictures)}",
                hint="give more pictures, or a share of energy such as --low-rank 0.99",
            )
        self._trained_on = len(data.pictures) - self.held_out

    def probe(self, number: int) -> Probe:
        """Training latents over all timesteps, others for every number."""
        settings = self._settings
        drawn = self.data.draw(
            PROBE_STEP + number, batch=settings.probe_rows, seed=settings.seed, among=self._trained_on
        )
        timesteps = spread_timesteps(settings.probe_rows, len(self._signal), drawn.generator)
        return self._make_probe(drawn.clean, drawn.noise, timesteps, drawn.captions)

    def batch(self, step: int) -> RecoveryBatch:
        """The batch of a step."""
        settings = self._settings
        drawn = self.data.draw(step, batch=settings.batch, seed=settings.seed, among=self._trained_on)
        timesteps = torch.randint(len(self._signal), (settings.batch,), generator=drawn.generator)
        pairs = max(1, settings.batch // PAIRED_SHARE)
        low, high = settings.guidance
        guidance = low + (high - low) * torch.rand(pairs, generator=drawn.generator)
        probe = self._make_probe(drawn.clean, drawn.noise, timesteps, drawn.captions)
        return RecoveryBatch(probe, self.data.encode([""]).expand(pairs, -1, -1), guidance.to(self.data.device))

    def captions(self, count: int) -> list[str]:
        """So many, or all that differ, of pictures that nothing is learnt from; of the others where there are none."""
        captions = self.data.pictures.captions
        chosen = captions[self._trained_on :] if self.held_out else captions
        return list(dict.fromkeys(each[0] for each in chosen))[:count]

    def apart(self) -> tuple[Tensor, Tensor]:
        """Clean latents that nothing is learnt from, [N, C, H, W], and the states of their captions, [N, T, D]."""
        captions = [captions[0] for captions in self.data.pictures.captions[self._trained_on :]]
        return self.data.latents.mean[self._trained_on :], self.data.encode(captions)

    def _make_probe(self, clean: Any, noise: Any, timesteps: Any, captions: list[str]) -> Probe:
        made = make_probe(
            clean,
            noise,
            timesteps,
            self.data.encode(captions),
            signal=self._signal,
            prediction_type=self._schedule.prediction_type,
        )
        device = self.data.device
        sample = made.sample.to(device, memory_format=torch.channels_last)
        return Probe(sample, made.timesteps.to(device), made.states, made.truth.to(device))
