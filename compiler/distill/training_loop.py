"""What all training has in common: an optimiser's step, its log, progress, checkpoints and grids on the way."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdc.compiler.distill.progress_files import LossLog
from sdc.engines.errors import InputError, NumericalError

log = logging.getLogger(__name__)

CHECKPOINT, LOSSES = "checkpoint.pt", "losses.jsonl"
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
class Training:
    """How steps are run.

    Attributes:
        optimize: does a step, and returns what the log has of it.
        save: writes a checkpoint after a step, given the seconds spent so far.
        draw: writes a grid after a step.
    """

    optimize: Callable[[int], dict[str, float]]
    save: Callable[[int, float], None]
    draw: Callable[[int], None]


def run_steps(training: Training, steps: range, *, seconds: float, losses: LossLog, reporting: Reporting) -> float:
    """Do the steps; after the last one there are a checkpoint and a grid.

    Args:
        training: what a step is.
        steps: their numbers.
        seconds: spent before, over all processes.
        losses: gets a line for each step.
        reporting: how often what is written.

    Returns:
        Seconds spent in all.
    """
    begin, last = time.perf_counter(), steps.stop - 1
    spent = 0.0
    for step in steps:
        losses.add(step, **training.optimize(step))
        spent = time.perf_counter() - begin
        if step % 20 == 0 or step == last:
            pace = spent / (step - steps.start + 1)
            left = f"{pace:.2f} s a step, {pace * (last - step) / 60:.0f} min left"
            reporting.tell(f"step {step}/{last}, loss {statistics.fmean(losses.losses[-20:]):.5f}, {left}")
        if step % reporting.checkpoint_every == 0 or step == last:
            losses.sync()
            training.save(step, seconds + spent)
        if step % reporting.grid_every == 0 or step == last:
            training.draw(step)
    return seconds + spent


def descend(
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    accelerator: Accelerator,
    step: int,
    learning_rate: float,
) -> dict[str, float]:
    """One step of the optimiser down a loss; returns what the log has of it.

    Raises:
        NumericalError: the loss or its gradient is not finite; nothing is changed then.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(loss)
    norm = float(nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM))
    value = loss.item()
    if not np.isfinite([value, norm]).all():
        raise NumericalError(f"the loss of step {step} is {value}", hint="try a lower --learning-rate, or fp32")
    optimizer.step()
    return {"loss": value, "learning_rate": learning_rate, "gradient_norm": norm}
