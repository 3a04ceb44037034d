"""Trains the text encoder and the UNet of `tiny` together, in latent space.

The loss is the epsilon-prediction error of Ho et al. (arXiv:2006.11239, eq. 14), weighted by min-SNR with gamma = 5
(Hang et al., arXiv:2303.09556, eq. 8); one caption in ten is empty, for classifier-free guidance (Ho & Salimans,
arXiv:2207.12598). What is kept is the exponential moving average of the weights.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdc.compiler.tiny.architecture import make_scheduler, make_text_encoder, make_unet
from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS, HELD_OUT, TEMPLATES, caption
from sdc.compiler.tiny.data import GreyPictures, render
from sdc.compiler.tiny.memory_layout import channels_last

log = logging.getLogger(__name__)

EMPTY_CAPTION_SHARE = 0.1
MIN_SNR_GAMMA = 5.0


@dataclass(frozen=True)
class LatentSet:
    """Encoded training pictures.

    Attributes:
        mean: [N, 4, 8, 8], float32, scaled to unit variance; ``deviation`` likewise.
        garments: [N]; ``colours`` and ``backgrounds`` likewise: what each picture shows.
    """

    mean: Tensor
    deviation: Tensor
    garments: np.ndarray
    colours: np.ndarray
    backgrounds: np.ndarray


@dataclass(frozen=True)
class UNetRecipe:
    """Options of a training run.

    Attributes:
        steps: optimiser steps.
        seed: of batches, captions and noise.
        batch: pictures a step.
        learning_rate: the largest; it falls to zero along a cosine.
        constant_share: of the steps, before it falls.
        ema_decay: of the averaged weights, which are the result.
        gradient_checkpointing: less memory, more time.
        checkpoint_every: steps between checkpoints.
    """

    steps: int
    seed: int = 0
    batch: int = 64
    learning_rate: float = 1e-3
    constant_share: float = 0.5
    ema_decay: float = 0.9995
    gradient_checkpointing: bool = False
    checkpoint_every: int = 500


class Denoiser(nn.Module):
    """Text encoder and UNet, trained as one."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor, caption_of: Tensor) -> Tensor:
        """Predict the noise of `latents` [N, 4, H, W]; `tokens` [M, 77] are the batch's distinct captions."""
        states = self.text_encoder(tokens).last_hidden_state[caption_of]
        noise: Tensor = self.unet(latents, timesteps, states).sample
        return noise


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, data: GreyPictures, *, seed: int) -> LatentSet:
    """Encode each picture once in a random colour on a random background; held-out pairs do not occur."""
    random = np.random.default_rng(seed)
    colours = allowed_colours(data.garments, random)
    backgrounds = random.integers(len(BACKGROUNDS), size=len(data.pixels))
    means, deviations = [], []
    for begin in range(0, len(data.pixels), 500):
        part = slice(begin, begin + 500)
        pictures = render(data.pixels[part], colours[part], backgrounds[part])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        means.append(posterior.mean.float() * vae.config.scaling_factor)
        deviations.append(posterior.std.float() * vae.config.scaling_factor)
        if begin % 10_000 == 0:
            log.info("encoded %d of %d pictures", begin, len(data.pixels))
    mean, deviation = torch.cat(means).contiguous(), torch.cat(deviations).contiguous()
    return LatentSet(mean, deviation, data.garments, colours, backgrounds)


def allowed_colours(garments: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A colour for each garment [N], evenly among those that are not held out for it."""
    held_out = dict(HELD_OUT)
    forbidden = np.array([held_out[garment] for garment in garments.tolist()])
    drawn = random.integers(len(COLOURS) - 1, size=len(garments))
    return drawn + (drawn >= forbidden)


def train_unet(
    latents: LatentSet,
    tokenizer: CLIPTokenizer,
    recipe: UNetRecipe,
    *,
    folder: Path,
    on_checkpoint: Callable[[Denoiser, int], None],
    start: Denoiser | None = None,
) -> Denoiser:
    """Train, or continue from `folder`'s last checkpoint; returns the averaged weights.

    A run that is stopped and continued draws the same batches and noise as one that is not.

    Args:
        latents: what to learn.
        tokenizer: of the captions.
        recipe: how.
        folder: holds the checkpoint.
        on_checkpoint: receives the averaged weights so far and the step.
        start: weights to begin with; fresh ones if None. It is not changed.
    """
    torch.manual_seed(recipe.seed)
    model = Denoiser(make_text_encoder(tokenizer), make_unet()) if start is None else copy.deepcopy(start)
    model = channels_last(model.requires_grad_(True).train())
    if recipe.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, recipe))
    state_file = folder / "unet-training.pt"
    first_step = _restore(state_file, model, average, optimizer, schedule) + 1
    batches = _batches(latents, tokenizer, make_scheduler(), recipe, first_step)
    losses: list[float] = []
    begin = time.perf_counter()
    for step, batch in enumerate(batches, start=first_step):
        loss = _loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _update_average(average, model, min(recipe.ema_decay, step / (step + 10)))
        losses.append(loss.item())
        if step % 100 == 0:
            seconds = (time.perf_counter() - begin) / (step - first_step + 1)
            log.info("unet: step %d/%d loss %.4f, %.3f s a step", step, recipe.steps, np.mean(losses[-100:]), seconds)
        if step % recipe.checkpoint_every == 0 or step == recipe.steps:
            _save(state_file, step, model, average, optimizer, schedule)
            on_checkpoint(average, step)
    return average.eval()


def _learning_rate_factor(step: int, recipe: UNetRecipe) -> float:
    """Linear warm-up over 200 steps, constant for a share of them all, then a cosine to zero."""
    progress = max(0.0, step / recipe.steps - recipe.constant_share) / (1 - recipe.constant_share)
    return min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class _Batch:
    noisy: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor
    tokens: Tensor
    caption_of: Tensor


def _batches(
    latents: LatentSet, tokenizer: CLIPTokenizer, scheduler: DDIMScheduler, recipe: UNetRecipe, first_step: int
) -> Iterator[_Batch]:
    """The batches of steps `first_step` to the last; each is drawn from a generator of its own step."""
    signal = scheduler.alphas_cumprod
    snr = signal / (1 - signal)
    loss_weight = snr.clamp(max=MIN_SNR_GAMMA) / snr
    token_of: dict[str, Tensor] = {}
    for step in range(first_step, recipe.steps + 1):
        random = np.random.default_rng((recipe.seed, step))
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        chosen = random.integers(len(latents.mean), size=recipe.batch)
        clean = latents.mean[chosen]
        clean = clean + latents.deviation[chosen] * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(len(signal), (recipe.batch,), generator=generator)
        captions = [_draw_caption(latents, index, random) for index in chosen]
        distinct = sorted(set(captions))
        for text in distinct:
            if text not in token_of:
                token_of[text] = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids[
                    0
                ]
        yield _Batch(
            noisy=scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last),
            noise=noise,
            timesteps=timesteps,
            weights=loss_weight[timesteps],
            tokens=torch.stack([token_of[text] for text in distinct]),
            caption_of=torch.tensor([distinct.index(text) for text in captions]),
        )


def _draw_caption(latents: LatentSet, index: int, random: np.random.Generator) -> str:
    if random.random() < EMPTY_CAPTION_SHARE:
        return ""
    template = int(random.integers(len(TEMPLATES)))
    return caption(int(latents.garments[index]), int(latents.colours[index]), int(latents.backgrounds[index]), template)


def _loss(model: Denoiser, batch: _Batch) -> Tensor:
    predicted = model(batch.noisy, batch.timesteps, batch.tokens, batch.caption_of)
    errors: Tensor = ((predicted - batch.noise) ** 2).mean((1, 2, 3))
    return (errors * batch.weights).mean()


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _save(
    path: Path,
    step: int,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def _restore(
    path: Path,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Load the checkpoint if there is one; returns the step that it was taken after, or 0."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    log.info("unet: continuing after step %d", state["step"])
    return int(state["step"])
