"""What determines the result of a distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sdc.compiler.lora_argument import CONSISTENCY
from sdc.engines.errors import InputError

PRECISIONS = ("fp32", "bf16")

DENOISING = "denoising"
"""What a LoRA learns, beside `CONSISTENCY`: see `sdc.compiler.distill.objectives`."""

WARM_UP_STEPS = 32
"""Over which the learning rate rises."""


@dataclass(frozen=True)
class DistillSettings:
    """How a LoRA is trained; equal settings, data and model give equal losses on one machine.

    Attributes:
        rank: of every layer's update.
        steps: optimiser steps.
        batch: pictures a step.
        learning_rate: the largest; see `learning_rate_at`.
        guidance: smallest and largest guidance scale of the teacher, 1 being none; drawn evenly for each picture. Of
            consistency alone.
        average_decay: of the target, the average of the student's LoRA, which is also the result.
        huber_width: where the loss turns from squares to absolute values; of consistency alone.
        seed: of the LoRA's first weights, of batches and of noise.
        precision: "fp32", or "bf16" for autocast of the networks.
        gradient_checkpointing: less memory, more time; the same losses.
        objective: what is learnt, ``CONSISTENCY`` or ``DENOISING``.
        empty_captions: share of captions that are left empty, so that guidance finds the style in both of its halves.
    """

    rank: int = 64
    steps: int = 1000
    batch: int = 12
    learning_rate: float = 1e-4
    guidance: tuple[float, float] = (6.0, 9.0)
    average_decay: float = 0.95
    huber_width: float = 0.001
    seed: int = 0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    objective: str = CONSISTENCY
    empty_captions: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, found {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"the seed must be in 0 to 2**32 - 1, found {self.seed}")
        if not self.learning_rate > 0:
            raise InputError(f"the learning rate must be above 0, found {self.learning_rate}")
        low, high = self.guidance
        if not 1 <= low <= high:
            raise InputError(f"guidance {low:g}:{high:g} is no range of scales", hint="give LOW:HIGH of 1 or more")
        if not 0 <= self.average_decay < 1:
            raise InputError(f"the average's decay must be in 0 to 1, found {self.average_decay}")
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}", hint=f"choose from {', '.join(PRECISIONS)}")
        if self.objective not in (CONSISTENCY, DENOISING):
            raise InputError(f"unknown objective {self.objective!r}", hint=f"choose {CONSISTENCY} or {DENOISING}")
        if not 0 <= self.empty_captions < 1:
            raise InputError(f"the share of empty captions must be in 0 to 1, found {self.empty_captions}")

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint and the result's metadata hold it."""
        return {**asdict(self), "guidance": list(self.guidance)}


def settings_for(model: str) -> DistillSettings:
    """What suits a model: `tiny` has a recipe of its own."""
    if model == "tiny":
        return DistillSettings(rank=4, steps=1600, batch=32, learning_rate=2e-3, guidance=(1.8, 2.5))
    return DistillSettings()


STYLE_OF_TINY = DistillSettings(
    rank=4,
    steps=600,
    batch=32,
    learning_rate=2e-3,
    guidance=(1.0, 1.0),
    average_decay=0.98,
    objective=DENOISING,
    empty_captions=0.1,
)
"""What `scripts/train_style_lora.py` trains with."""


def learning_rate_at(step: int, *, steps: int, largest: float) -> float:
    """Rises over the first steps, is constant until half of them, and falls to zero along a cosine.

    Args:
        step: from 1.
        steps: of the run.
        largest: the constant one.
    """
    warm_up = min(1.0, step / WARM_UP_STEPS)
    falling = max(0.0, 2 * (step - 1) / steps - 1)
    return largest * warm_up * 0.5 * (1 + math.cos(math.pi * falling))


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What two descriptions of a run do not have in common, one phrase each."""
    return [
        f"{name} is {found.get(name)!r} there and {expected.get(name)!r} here"
        for name in dict.fromkeys([*expected, *found])
        if found.get(name) != expected.get(name)
    ]
