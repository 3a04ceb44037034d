"""Distils a LoRA that lets a model draw in a few steps: Luo et al., "LCM-LoRA", arXiv:2311.05556."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from sdc.compiler.distill.adapters import LoraRoles
from sdc.compiler.distill.consistency import Batch
from sdc.compiler.distill.objectives import OBJECTIVES
from sdc.compiler.distill.pictures import Pictures
from sdc.compiler.distill.preview import save_preview
from sdc.compiler.distill.progress_files import Checkpoint as SavedRun
from sdc.compiler.distill.progress_files import LossLog, load_checkpoint_of
from sdc.compiler.distill.settings import DistillSettings, learning_rate_at
from sdc.compiler.distill.training_data import TrainingData
from sdc.compiler.distill.training_loop import CHECKPOINT, LOSSES, Reporting, Training, descend, run_steps
from sdc.compiler.load import Checkpoint
from sdc.compiler.tiny.memory_layout import channels_last
from sdc.compiler.workshop.staging import exclusive
from sdc.engines.errors import InputError
from sdc.engines.schedule_config import schedule_from_config


@dataclass(frozen=True)
class Distilled:
    """What a run came to.

    Attributes:
        out: the LoRA.
        trained_share: its parameters as a share of the UNet's.
        minutes: spent in training, over all processes.
        last_loss: mean of the last tenth of the steps.
    """

    out: Path
    trained_share: float
    minutes: float
    last_loss: float


def distill_lora(
    checkpoint: Checkpoint, pictures: Pictures, settings: DistillSettings, *, out: Path, reporting: Reporting
) -> Distilled:
    """Train a LoRA, or go on from the checkpoint in the run's folder, and write it.

    A run that is killed and started again gives the same losses and the same file as one that is not, on one machine
    with one number of threads.

    Raises:
        InputError: the folder holds a checkpoint of another run, or the model has its guidance as an input.
        NumericalError: the loss is not finite.
    """
    if checkpoint.config("unet").get("time_cond_proj_dim") is not None:
        raise InputError(f"{checkpoint.source} is a latent consistency model already", hint="distil its base model")

    def wait() -> None:
        reporting.tell(f"waiting for another process that works in {reporting.folder}")

    with exclusive(reporting.folder, on_wait=wait):
        reporting.folder.mkdir(exist_ok=True)
        return Trainer(checkpoint, pictures, settings, reporting).run(out)


class Trainer:
    """The networks, the data and the optimiser of one run."""

    def __init__(
        self, checkpoint: Checkpoint, pictures: Pictures, settings: DistillSettings, reporting: Reporting
    ) -> None:
        self.settings, self.reporting = settings, reporting
        self.identity = {
            **settings.to_json(),
            "data": pictures.digest,
            **{name: checkpoint.digest(name) for name in ("unet", "text_encoder", "vae_encoder")},
        }
        saved = load_checkpoint_of(self.identity, reporting.folder / CHECKPOINT)
        self.accelerator = Accelerator(mixed_precision="no" if settings.precision == "fp32" else settings.precision)
        device = self.accelerator.device
        self.schedule = schedule_from_config(checkpoint.scheduler_config)
        self.objective = OBJECTIVES[settings.objective](self.schedule, settings, device)
        self.data = TrainingData(checkpoint, pictures, device=device, reporting=reporting)
        unet = channels_last(checkpoint.unet()).to(device)
        self.lora = LoraRoles(unet, rank=settings.rank, seed=settings.seed)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()  # else diffusers does not checkpoint; it changes nothing else, as SD's networks drop nothing
        self.optimizer = torch.optim.AdamW(self.lora.student.values(), lr=settings.learning_rate, weight_decay=0.0)
        self.step, self.seconds = 0, 0.0
        if saved is not None:
            self.lora.load_state(saved.weights)
            self.optimizer.load_state_dict(saved.optimizer)
            self.step, self.seconds = saved.step, saved.seconds

    def run(self, out: Path) -> Distilled:
        """All steps that are left, then the file."""
        if self.step:
            self.reporting.tell(f"going on after step {self.step}")
        losses = LossLog(self.reporting.folder / LOSSES, step=self.step)
        try:
            self._train(losses)
        finally:
            losses.close()
        self.lora.save(out, metadata=self.identity)
        last = statistics.fmean(losses.losses[-max(1, self.settings.steps // 10) :])
        return Distilled(out, self.lora.trained_share(), self.seconds / 60, last)

    def _train(self, losses: LossLog) -> None:
        training = Training(self._optimize, self._save, self._draw)
        steps = range(self.step + 1, self.settings.steps + 1)
        self.seconds = run_steps(training, steps, seconds=self.seconds, losses=losses, reporting=self.reporting)

    def _optimize(self, step: int) -> dict[str, float]:
        """One step; returns what the log has of it."""
        batch = self._batch(step)
        with self.accelerator.autocast():
            loss = self.objective.loss(self.lora.roles(), batch)
        line = descend(
            loss,
            list(self.lora.student.values()),
            self.optimizer,
            accelerator=self.accelerator,
            step=step,
            learning_rate=learning_rate_at(step, steps=self.settings.steps, largest=self.settings.learning_rate),
        )
        self.lora.average(min(self.settings.average_decay, step / (step + 10)))
        return line

    def _batch(self, step: int) -> Batch:
        """The batch of a step, drawn from generators of its own."""
        settings, device = self.settings, self.accelerator.device
        drawn = self.data.draw(step, batch=settings.batch, seed=settings.seed, empty_captions=settings.empty_captions)
        steps = torch.randint(self.objective.levels, (settings.batch,), generator=drawn.generator)
        low, high = settings.guidance
        guidance = low + (high - low) * torch.rand(settings.batch, generator=drawn.generator)
        states = self.data.encode([*drawn.captions, ""])
        return Batch(
            clean=drawn.clean.to(device, memory_format=torch.channels_last),
            noise=drawn.noise.to(device, memory_format=torch.channels_last),
            steps=steps.to(device),
            guidance=guidance.to(device),
            conditional=states[:-1],
            unconditional=states[-1:].expand(settings.batch, -1, -1),
        )

    def _save(self, step: int, seconds: float) -> None:
        saved = SavedRun(self.identity, step, seconds, self.lora.state(), self.optimizer.state_dict())
        saved.save(self.reporting.folder / CHECKPOINT)

    def _draw(self, step: int) -> None:
        path = self.reporting.folder / f"grid-{step:06}.png"
        prompts = self.reporting.prompts
        painter = (self.lora.roles().target, self.data.vae, self.schedule)
        with self.accelerator.autocast():
            save_preview(
                path,
                painter,
                columns=self.objective.preview,
                prompts=prompts,
                states=self.data.encode(prompts),
                size=self.data.latent_size,
            )
        columns = ", ".join(f"{sampler} {steps}" for sampler, steps in self.objective.preview)
        self.reporting.tell(f"{path}: pictures of {columns}")
