"""The judge: a small classifier whose features and verdicts evaluation uses, never the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdc.compiler.tiny.captions import BACKGROUNDS, COLOURS, GARMENTS

FEATURES = 64


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in N pictures.

    Attributes:
        features: [N, 64], float32, the penultimate layer; Fréchet distances are taken on it.
        garments: [N], indices into ``GARMENTS``; likewise ``colours`` and ``backgrounds``.
    """

    features: Tensor
    garments: Tensor
    colours: Tensor
    backgrounds: Tensor


class Judge(nn.Module):
    """Convolutional classifier of garment, colour and background.

    Args:
        width: channels of the first stage; the second has twice as many.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()

        def stage(channels_in: int, channels_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
                nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
            )

        self.first = stage(3, width)
        self.second = stage(width, 2 * width)
        self.third = stage(2 * width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.project = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * width * 16, FEATURES), nn.ReLU())
        self.garment = nn.Linear(FEATURES, len(GARMENTS))
        self.colour = nn.Linear(FEATURES, len(COLOURS))
        self.background = nn.Linear(FEATURES, len(BACKGROUNDS))

    def activations(self, pictures: Tensor) -> list[Tensor]:
        """Feature maps of the three stages for pictures [N, 3, 32, 32] in [-1, 1]."""
        first = self.first(pictures)
        second = self.second(self.pool(first))
        return [first, second, self.third(self.pool(second))]

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features [N, 64] and the logits of garment, colour and background."""
        features = self.project(self.pool(self.activations(pictures)[-1]))
        return features, self.garment(features), self.colour(features), self.background(features)

    @torch.no_grad()
    def judge(self, pictures: Tensor, batch: int = 256) -> Verdict:
        """Judge pictures [N, 3, 32, 32] in [-1, 1]."""
        self.eval()
        parts = [self(part) for part in pictures.split(batch)]
        features, garments, colours, backgrounds = (torch.cat(column) for column in zip(*parts, strict=True))
        return Verdict(features, garments.argmax(1), colours.argmax(1), backgrounds.argmax(1))
