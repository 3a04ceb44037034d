"""How far pictures of a preset may be from those of the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdc.compiler.evaluate.metrics import PSNR_CEILING_DB
from sdc.compiler.evaluate.settings import JUDGED_MODEL
from sdc.compiler.precision.budget import Measure
from sdc.engines.errors import InputError

FIGURES = {Measure.FRECHET: "change.frechet_to_real", Measure.PSNR: "paired.psnr_db"}
"""What is limited, as `sdc.compiler.evaluate.figures` has it."""

_LARGEST_CHANGE = 100.0
"""Of a Fréchet distance: pictures of something else altogether."""

_HINT = "for example --budget fd=+1.0 for tiny, --budget psnr=30 for other models"


@dataclass(frozen=True)
class Budget:
    """A limit and what it is a limit of.

    Attributes:
        measure: the change of the Fréchet distance to real pictures, or PSNR to the reference's.
        limit: the largest change, or the least PSNR in dB.
    """

    measure: Measure
    limit: float

    def allows(self, quality: float) -> bool:
        """Whether a measured value keeps to the limit."""
        return quality >= self.limit if self.measure is Measure.PSNR else quality <= self.limit

    def harm(self, quality: float) -> float:
        """What a value stands for in a sum over shortcuts: 0 for none, the more the worse.

        Mean squared errors add up where shortcuts err independently of each other; so do changes of a distance, of
        which those to the better are not counted on.
        """
        return 10 ** (-quality / 10) if self.measure is Measure.PSNR else max(0.0, quality)

    def best(self) -> float:
        """Of the very pictures of the reference."""
        return PSNR_CEILING_DB if self.measure is Measure.PSNR else 0.0

    def hoped(self, quality: float, noise: float) -> float:
        """What a value could well be on more pictures: better by a standard deviation."""
        return quality + noise if self.measure is Measure.PSNR else quality - noise

    def text(self, quality: float) -> str:
        """A value as it is told to people."""
        return f"{quality:.2f} dB" if self.measure is Measure.PSNR else f"{quality:+.3f}"

    def __str__(self) -> str:
        return f"{self.measure.value}={self.limit:{'g' if self.measure is Measure.PSNR else '+g'}}"

    def check_model(self, model: str) -> None:
        """Pass only for a model whose pictures can be measured so.

        Raises:
            InputError: there is no judge for its pictures.
        """
        if self.measure is Measure.FRECHET and model != JUDGED_MODEL:
            raise InputError(
                f"--budget {self}: a Fréchet distance needs a judge of pictures, which there is for {JUDGED_MODEL!r}, "
                f"not for {model!r}",
                hint="give the budget as PSNR to the reference's pictures, for example --budget psnr=30",
            )


def parse_budget(text: str) -> Budget:
    """A budget as it is written: "fd=+1.0" or "psnr=30".

    Raises:
        InputError: it is none.
    """
    name, equals, number = text.partition("=")
    if not equals or name not in list(Measure):
        known = " or ".join(f"{each.value}=NUMBER" for each in (Measure.FRECHET, Measure.PSNR))
        raise InputError(f"--budget {text!r}: expected {known}", hint=_HINT)
    measure = Measure(name)
    try:
        limit = float(number.lower().removesuffix("db") if measure is Measure.PSNR else number)
    except ValueError:
        limit = math.nan
    most = PSNR_CEILING_DB if measure is Measure.PSNR else _LARGEST_CHANGE
    if not 0 <= limit < most:
        unit = "decibels" if measure is Measure.PSNR else "a change of the Fréchet distance"
        raise InputError(f"--budget {text!r}: expected {unit}, from 0 to less than {most:g}", hint=_HINT)
    return Budget(measure, limit)
