"""How far pictures of automatic precisions may be from those in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdc.compiler.evaluate.metrics import PSNR_CEILING_DB, psnr
from sdc.compiler.evaluate.settings import JUDGED_MODEL
from sdc.engines.errors import InputError

if TYPE_CHECKING:
    from sdc.compiler.tiny.judge import Judge

JUDGE_PATH = Path(__file__).parent.parent / "models" / "judge.safetensors"
JUDGE_SOURCES = ("sdc.compiler.evaluate.frechet", "sdc.compiler.evaluate.verdicts", "sdc.compiler.tiny.judge")
"""What a Fréchet distance is taken with."""


class Measure(StrEnum):
    """What is compared.

    ``PSNR``: the mean over pairs of pictures at equal prompts and seeds, dB.
    ``FRECHET``: the Fréchet distance between both sets of pictures, on the judge's features.
    """

    PSNR = "psnr"
    FRECHET = "fd"


_LIMITS = {Measure.PSNR: PSNR_CEILING_DB, Measure.FRECHET: 100.0}
"""What budgets are below: equal pictures; pictures of something else altogether."""


@dataclass(frozen=True)
class QualityBudget:
    """A limit and what it is a limit of.

    Attributes:
        measure: of the pictures.
        limit: least PSNR in dB, or largest Fréchet distance.
    """

    measure: Measure
    limit: float

    def allows(self, value: float) -> bool:
        """Whether a measured value keeps to the limit."""
        return self.merit(value) >= self.merit(self.limit)

    def merit(self, value: float) -> float:
        """Larger is better, whatever is measured."""
        return value if self.measure is Measure.PSNR else -value

    def text(self, value: float) -> str:
        """A value as it is told to people."""
        if not isfinite(value):
            return "no finite picture"
        return f"{value:.4g} dB" if self.measure is Measure.PSNR else f"a Fréchet distance of {value:.4g}"

    @property
    def worst(self) -> float:
        """Of pictures that are not finite."""
        return -inf if self.measure is Measure.PSNR else inf

    @property
    def pictures(self) -> int:
        """Pictures that the measure needs; every one has a prompt or a seed of its own."""
        return 8 if self.measure is Measure.PSNR else 256

    def check_model(self, model: str) -> None:
        """Pass only for a model whose pictures can be measured so.

        Raises:
            InputError: there is no judge for its pictures.
        """
        if self.measure is Measure.FRECHET and model != JUDGED_MODEL:
            raise InputError(
                f"--quality-budget {Measure.FRECHET}: a Fréchet distance needs a judge of pictures, which there is for "
                f"{JUDGED_MODEL!r}, not for {model!r}",
                hint="give the budget in decibels, for example 40dB",
            )

    def compare(self, found: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
        """The measured value of pictures [1, 3, H, W], as decoded: values span -1 to 1."""
        left, right = (np.concatenate(each).clip(-1, 1) for each in (found, exact))
        if self.measure is Measure.PSNR:
            return float(np.minimum(psnr(left, right, data_range=2), PSNR_CEILING_DB).mean())
        return _judged_distance(left, right)


def parse_budget(text: str) -> QualityBudget:
    """A budget as it is written: "40dB", "40" or "fd=0.01".

    Raises:
        InputError: it is none.
    """
    name, _, number = text.rpartition("=")
    hint = "for example 40dB, or fd=0.01 for tiny"
    if name not in ("", *Measure):
        raise InputError(f"--quality-budget {text!r}: {name!r} is no measure", hint=hint)
    measure = Measure(name or Measure.PSNR)
    try:
        limit = float(number.lower().removesuffix("db") if measure is Measure.PSNR else number)
    except ValueError as error:
        unit = "decibels" if measure is Measure.PSNR else "a Fréchet distance"
        raise InputError(f"--quality-budget {text!r} is no number of {unit}", hint=hint) from error
    if not 0 < limit < _LIMITS[measure]:
        raise InputError(
            f"--quality-budget {text!r}: expected more than 0 and less than {_LIMITS[measure]:g}, found {limit:g}",
            hint="pictures look the same from 40 dB on" if measure is Measure.PSNR else hint,
        )
    return QualityBudget(measure, limit)


def _judged_distance(left: np.ndarray, right: np.ndarray) -> float:
    import torch

    from sdc.compiler.evaluate.frechet import Gaussian, frechet_distance

    fitted = (
        Gaussian.fit(_judge().judge(torch.from_numpy(pictures.astype(np.float32))).features.numpy())
        for pictures in (left, right)
    )
    return frechet_distance(*fitted)


@lru_cache(maxsize=1)
def _judge() -> Judge:
    from sdc.compiler.evaluate.verdicts import load_judge

    return load_judge(JUDGE_PATH)
