"""Trains the judge, and the separate network that the VAE's feature loss uses."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch.nn import functional as F

from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS
from sdc.compiler.tiny.data import GreyPictures, render
from sdc.compiler.tiny.judge import Judge
from sdc.compiler.tiny.memory_layout import channels_last

log = logging.getLogger(__name__)


def train_judge(data: GreyPictures, *, seed: int, epochs: int, width: int, batch: int = 128) -> Judge:
    """Train a judge on randomly coloured, shifted and mirrored pictures; same seed, same weights."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    judge = channels_last(Judge(width))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    steps_per_epoch = len(data.pixels) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps_per_epoch)
    for epoch in range(epochs):
        judge.train()
        order = random.permutation(len(data.pixels))
        for step in range(steps_per_epoch):
            chosen = order[step * batch : (step + 1) * batch]
            colours = random.integers(len(COLOURS), size=batch)
            backgrounds = random.integers(len(BACKGROUNDS), size=batch)
            pictures = render(data.pixels[chosen], colours, backgrounds, shift_px=random.integers(-1, 2, (batch, 2)))
            if random.random() < 0.5:
                pictures = pictures.flip(-1)
            _, garment, colour, background = judge(pictures.contiguous(memory_format=torch.channels_last))
            loss = (
                F.cross_entropy(garment, torch.from_numpy(data.garments[chosen]), label_smoothing=0.05)
                + 0.3 * F.cross_entropy(colour, torch.from_numpy(colours))
                + 0.3 * F.cross_entropy(background, torch.from_numpy(backgrounds))
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        log.info("judge: epoch %d of %d, last loss %.3f", epoch + 1, epochs, loss.item())
    return judge.eval()


def measure_accuracy(judge: Judge, data: GreyPictures, *, seed: int) -> dict[str, float]:
    """Accuracy on real pictures in random colours, as fractions of one."""
    random = np.random.default_rng(seed)
    colours = random.integers(len(COLOURS), size=len(data.pixels))
    backgrounds = random.integers(len(BACKGROUNDS), size=len(data.pixels))
    verdict = judge.judge(render(data.pixels, colours, backgrounds))
    return {
        "garment": float((verdict.garments.numpy() == data.garments).mean()),
        "colour": float((verdict.colours.numpy() == colours).mean()),
        "background": float((verdict.backgrounds.numpy() == backgrounds).mean()),
    }
