"""Trains the autoencoder of `tiny`: `AutoencoderKL` with a reduction of 4 and four latent channels.

The loss is L1 + 0.5 MSE + the L1 of the picture's gradients + a feature loss + a very small KL term. The features
come from a network that is trained with another seed than the judge, so that the judge stays an outsider.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS
from sdc.compiler.tiny.data import GreyPictures, render
from sdc.compiler.tiny.judge import Judge
from sdc.compiler.tiny.memory_layout import channels_last

log = logging.getLogger(__name__)

KL_WEIGHT = 1e-6


def make_vae() -> AutoencoderKL:
    """The untrained architecture: SD's block types at widths 32, 64, 128 with two layers a block."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=32,
    )


def train_vae(
    data: GreyPictures,
    feature_network: Judge,
    *,
    seed: int,
    steps: int,
    checkpoint: Callable[[AutoencoderKL, int], None],
    batch: int = 32,
    learning_rate: float = 1e-3,
) -> AutoencoderKL:
    """Train from nothing for a fixed number of steps; the learning rate falls by a cosine to zero."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    vae = channels_last(make_vae())
    feature_network.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        pictures = _draw_batch(data, random, batch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            decoded = vae.decode(latents).sample
            features = _feature_loss(feature_network, decoded, pictures)
        decoded = decoded.float()
        loss = F.l1_loss(decoded, pictures) + 0.5 * F.mse_loss(decoded, pictures)
        loss = loss + 0.5 * _gradient_loss(decoded, pictures) + 0.1 * features
        loss = loss + KL_WEIGHT * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            mse = F.mse_loss(decoded.detach().clamp(-1, 1), pictures).item()
            seconds = (time.perf_counter() - begin) / step
            log.info(
                "vae: step %d/%d loss %.4f psnr %.2f dB, %.3f s a step", step, steps, loss.item(), _psnr(mse), seconds
            )
        if step % 1000 == 0:
            checkpoint(vae, step)
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae, data, seed=seed))
    return vae.eval()


def finetune_decoder(
    vae: AutoencoderKL, data: GreyPictures, feature_network: Judge, *, seed: int, steps: int, batch: int = 48
) -> AutoencoderKL:
    """Train the decoder further with the encoder fixed, so that a UNet that was trained on its latents stays valid.

    Source: the ``ft-mse`` decoders of Stable Diffusion; here the squared error has twice its former weight.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    vae.requires_grad_(False)
    decoder = nn.ModuleList([vae.decoder, vae.post_quant_conv]).requires_grad_(True).train()
    feature_network.requires_grad_(False)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
    for step in range(1, steps + 1):
        pictures = _draw_batch(data, random, batch)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.mean
            decoded = vae.decode(latents).sample
            features = _feature_loss(feature_network, decoded, pictures)
        decoded = decoded.float()
        loss = F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures)
        loss = loss + 0.5 * _gradient_loss(decoded, pictures) + 0.1 * features
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            log.info("decoder: step %d/%d loss %.4f", step, steps, loss.item())
    return vae.eval()


def _learning_rate_factor(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / 100)
    return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def _draw_batch(data: GreyPictures, random: np.random.Generator, batch: int) -> Tensor:
    chosen = random.integers(len(data.pixels), size=batch)
    colours = random.integers(len(COLOURS), size=batch)
    backgrounds = random.integers(len(BACKGROUNDS), size=batch)
    return render(data.pixels[chosen], colours, backgrounds).contiguous(memory_format=torch.channels_last)


def _gradient_loss(left: Tensor, right: Tensor) -> Tensor:
    difference = left - right
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def _feature_loss(network: Judge, decoded: Tensor, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = network.activations(pictures)
    found = network.activations(decoded)
    terms = [F.l1_loss(f, w) / w.abs().mean().clamp_min(1e-3) for f, w in zip(found, wanted, strict=True)]
    return torch.stack([term.float() for term in terms]).mean()


def _psnr(mse: float) -> float:
    """PSNR in dB of pictures in [-1, 1], whose peak-to-peak is 2."""
    return 10 * math.log10(4 / max(mse, 1e-12))


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderKL, data: GreyPictures, *, seed: int) -> float:
    """One over the standard deviation of the latents (Rombach et al., arXiv:2112.10752, appendix G)."""
    vae.eval()
    pictures = _draw_batch(data, np.random.default_rng(seed + 1), 1024)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(128)])
    return round(1.0 / latents.std().item(), 5)


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, data: GreyPictures, *, seed: int, count: int = 1000) -> float:
    """Mean PSNR in dB over pictures of `encode(x).mean` decoded again."""
    vae.eval()
    pictures = _draw_batch(data, np.random.default_rng(seed), count)
    values = []
    for part in pictures.split(100):
        decoded = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        values += [_psnr(mse) for mse in ((decoded - part) ** 2).mean((1, 2, 3)).tolist()]
    return float(np.mean(values))
