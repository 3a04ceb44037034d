"""Distils a LoRA that lets a model draw in a few steps: Luo et al., "LCM-LoRA", arXiv:2311.05556."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn

from sdc.compiler.distill.adapters import LoraRoles
from sdc.compiler.distill.consistency import Batch
from sdc.compiler.distill.objectives import OBJECTIVES
from sdc.compiler.distill.pictures import Latents, Pictures, encode_once
from sdc.compiler.distill.preview import save_preview
from sdc.compiler.distill.progress_files import Checkpoint as SavedRun
from sdc.compiler.distill.progress_files import LossLog, load_checkpoint_of
from sdc.compiler.distill.settings import DistillSettings, learning_rate_at
from sdc.compiler.half_stage import open_tokenizer
from sdc.compiler.load import Checkpoint
from sdc.compiler.tiny.memory_layout import channels_last
from sdc.compiler.workshop.staging import exclusive
from sdc.engines.errors import InputError, NumericalError
from sdc.engines.schedule_config import schedule_from_config
from sdc.engines.tokenizer import ClipTokenizer

log = logging.getLogger(__name__)

CHECKPOINT, LOSSES, LATENTS = "checkpoint.pt", "losses.jsonl", "latents.safetensors"
"""Files of a run's folder."""

GRADIENT_NORM = 1.0
"""Gradients are scaled down to this norm, as in diffusers' LCM training."""


@dataclass(frozen=True)
class Reporting:
    """What a run shows and keeps on its way; none of it changes the result.

    Attributes:
        folder: keeps checkpoint, losses, latents and grids; made if need be.
        prompts: of the grid.
        checkpoint_every: steps between checkpoints.
        grid_every: steps between grids.
        tell: receives lines of progress.
    """

    folder: Path
    prompts: Sequence[str]
    checkpoint_every: int = 100
    grid_every: int = 500
    tell: Callable[[str], None] = log.info

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "grid_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, found {getattr(self, name)}")


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
        self.settings, self.reporting, self.pictures = settings, reporting, pictures
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
        self.tokenizer = _tokenizer(checkpoint)
        self.text_encoder = checkpoint.text_encoder().to(device)
        self.vae = channels_last(checkpoint.vae()).to(device)
        path, digest = reporting.folder / LATENTS, checkpoint.digest("vae_encoder")
        self.latents: Latents = encode_once(
            pictures, self.vae, path, vae_digest=digest, device=device, tell=reporting.tell
        )
        unet = channels_last(checkpoint.unet()).to(device)
        self.lora = LoraRoles(unet, rank=settings.rank, seed=settings.seed)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()  # else diffusers does not checkpoint; it changes nothing else, as SD's networks drop nothing
        self.optimizer = torch.optim.AdamW(self.lora.student.values(), lr=settings.learning_rate, weight_decay=0.0)
        self.step, self.seconds = 0, 0.0
        if saved is not None:
            self.lora.load_state(saved.adapters)
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
        total, begin = self.settings.steps, time.perf_counter()
        before, first_step = self.seconds, self.step + 1
        for step in range(first_step, total + 1):
            losses.add(step, **self._optimize(step))
            self.step, self.seconds = step, before + time.perf_counter() - begin
            if step % 20 == 0 or step == total:
                pace = (self.seconds - before) / (step - first_step + 1)
                left = f"{pace:.2f} s a step, {pace * (total - step) / 60:.0f} min left"
                self.reporting.tell(f"step {step}/{total}, loss {statistics.fmean(losses.losses[-20:]):.5f}, {left}")
            if step % self.reporting.checkpoint_every == 0 or step == total:
                self._save()
            if step % self.reporting.grid_every == 0 or step == total:
                self._draw(step)

    def _optimize(self, step: int) -> dict[str, float]:
        """One step; returns what the log has of it."""
        learning_rate = learning_rate_at(step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        batch = self._batch(step)
        with self.accelerator.autocast():
            loss = self.objective.loss(self.lora.roles(), batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        norm = float(nn.utils.clip_grad_norm_(self.lora.student.values(), GRADIENT_NORM))
        value = loss.item()
        if not np.isfinite([value, norm]).all():
            raise NumericalError(f"the loss of step {step} is {value}", hint="try a lower --learning-rate, or fp32")
        self.optimizer.step()
        self.lora.average(min(self.settings.average_decay, step / (step + 10)))
        return {"loss": value, "learning_rate": learning_rate, "gradient_norm": norm}

    def _batch(self, step: int) -> Batch:
        """The batch of a step, drawn from generators of its own."""
        settings, device = self.settings, self.accelerator.device
        random = np.random.default_rng((settings.seed, step))
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        chosen = random.integers(len(self.pictures), size=settings.batch)
        captions = [_draw_one(self.pictures.captions[i], random) for i in chosen.tolist()]
        if settings.empty_captions:
            empty = random.random(settings.batch) < settings.empty_captions
            captions = ["" if left_empty else text for text, left_empty in zip(captions, empty, strict=True)]
        mean, deviation = self.latents.mean[chosen], self.latents.deviation[chosen]
        clean = mean + deviation * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        steps = torch.randint(self.objective.levels, (settings.batch,), generator=generator)
        low, high = settings.guidance
        guidance = low + (high - low) * torch.rand(settings.batch, generator=generator)
        states = self._encode([*captions, ""])
        return Batch(
            clean=clean.to(device, memory_format=torch.channels_last),
            noise=noise.to(device, memory_format=torch.channels_last),
            steps=steps.to(device),
            guidance=guidance.to(device),
            conditional=states[:-1],
            unconditional=states[-1:].expand(settings.batch, -1, -1),
        )

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> Tensor:
        """[N, T, D], float32."""
        tokens = torch.from_numpy(self.tokenizer.encode(captions)).to(self.accelerator.device)
        states: Tensor = self.text_encoder(tokens).last_hidden_state
        return states

    def _save(self) -> None:
        saved = SavedRun(self.identity, self.step, self.seconds, self.lora.state(), self.optimizer.state_dict())
        saved.save(self.reporting.folder / CHECKPOINT)

    def _draw(self, step: int) -> None:
        path = self.reporting.folder / f"grid-{step:06}.png"
        prompts = self.reporting.prompts
        painter = (self.lora.roles().target, self.vae, self.schedule)
        with self.accelerator.autocast():
            save_preview(
                path,
                painter,
                columns=self.objective.preview,
                prompts=prompts,
                states=self._encode(prompts),
                size=tuple(self.latents.mean.shape[1:]),
            )
        columns = ", ".join(f"{sampler} {steps}" for sampler, steps in self.objective.preview)
        self.reporting.tell(f"{path}: pictures of {columns}")


def _draw_one(captions: Sequence[str], random: np.random.Generator) -> str:
    return captions[int(random.integers(len(captions)))]


def _tokenizer(checkpoint: Checkpoint) -> ClipTokenizer:
    files = {f"tokenizer/{name}": content for name, content in checkpoint.tokenizer_files.items()}
    return open_tokenizer(files, {name: source.config for name, source in checkpoint.networks.items()})
