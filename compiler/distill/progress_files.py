"""What a run leaves in its folder: a checkpoint to go on from, and a log of losses."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdc.compiler.distill.settings import differences
from sdc.engines.errors import InputError


@dataclass(frozen=True)
class Checkpoint:
    """The state after a step; batches and noise are drawn from generators of each step, so none is part of it.

    Attributes:
        run: what determines the result: settings, digests of model and data.
        step: the last one that was done.
        seconds: spent in training so far, over all processes.
        weights: what is trained, by role: the LoRAs of student and target, or the weights of two networks.
        optimizer: state of the optimiser.
        structure: of networks that change on the way, and how they did so far.
    """

    run: Mapping[str, Any]
    step: int
    seconds: float
    weights: dict[str, dict[str, torch.Tensor]]
    optimizer: dict[str, Any]
    structure: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it so that `path` is the old checkpoint or the whole new one, whenever the process is killed."""
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            torch.save(vars(self), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def load_checkpoint_of(run: Mapping[str, Any], path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, None if there is none.

    Raises:
        InputError: it is of another run (it says what differs), or is damaged.
    """
    if not path.is_file():
        return None
    start_anew = "name another folder with --work, or remove this one"
    try:
        found = Checkpoint(**torch.load(path, weights_only=True, map_location="cpu"))
    except Exception as error:  # torch raises whatever its unpickler meets
        raise InputError(f"checkpoint {path} cannot be read: {error}", hint=start_anew) from error
    unlike = differences(found.run, run)
    if unlike:
        raise InputError(f"checkpoint {path} is of another run: {'; '.join(unlike)}", hint=start_anew)
    return found


class LossLog:
    """A JSON line for every step; lines of steps after `step`, which will be done again, are removed.

    Args:
        path: of the file.
        step: of the checkpoint that the run goes on from; 0 begins anew.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = lines[:step]
        if [_step_of(line) for line in kept] != list(range(1, step + 1)):
            raise InputError(f"{path} does not hold the losses of steps 1 to {step}", hint="remove the folder")
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self.losses = [float(json.loads(line)["loss"]) for line in kept]

    def add(self, step: int, *, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Write the line of the next step."""
        self.losses.append(loss)
        values = {"step": step, "loss": loss, "learning_rate": learning_rate, "gradient_norm": gradient_norm}
        self._file.write(json.dumps(values) + "\n")

    def sync(self) -> None:
        """Have all lines on the disk: to be called before a checkpoint says that their steps are done."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is written after this."""
        self._file.close()


def _step_of(line: str) -> int | None:
    """Of a line of the log; None for one that was cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
