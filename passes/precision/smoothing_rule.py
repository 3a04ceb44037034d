"""How SmoothQuant chooses what each channel is divided by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdc.engines.errors import InputError

DEFAULT_ALPHA = 0.5
"""Source: Xiao et al., arXiv:2211.10438, section 5: the sweet spot of most models."""

DEFAULT_OUTLIER_RATIO = 4.0
"""Measured on `tiny`: its own factors lie within 1/3 and 3.2 of their median at every site. Scaling those too costs a
quarter more epsilon error with asymmetric ranges, all of it behind BiasGeGlu: the rare large values there are what a
range that leaves a few out cuts off, and they matter more the more the channels resemble each other."""

LARGEST_FACTOR = 1e4
"""A channel that calibration hardly ever sees alive must not get weights that float16 cannot hold."""


@dataclass(frozen=True)
class SmoothingRule:
    """How much moves from activations to weights, and in which channels.

    Attributes:
        alpha: 1 makes all channels of an activation equal, 0 all rows of the weight.
        outlier_ratio: a channel is scaled if its factor is this many times its site's median factor, or that part of
            it; 1 scales all channels.
    """

    alpha: float = DEFAULT_ALPHA
    outlier_ratio: float = DEFAULT_OUTLIER_RATIO

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"SmoothQuant's alpha is {self.alpha:g}", hint="give a number from 0 to 1, or none")
        if not 1 <= self.outlier_ratio < np.inf:
            raise InputError(
                f"SmoothQuant's outlier ratio is {self.outlier_ratio:g}",
                hint="give a number from 1, which smooths every channel",
            )

    @property
    def label(self) -> str:
        """As `parse_smoothing` reads it, every digit: ``0.5:4.0``."""
        return f"{self.alpha}:{self.outlier_ratio}"

    def factors(self, activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """What each channel of the activation is divided by: [channels], float64.

        Dead channels (of the activation or the weight) keep 1, and so do channels that are no outliers. An outlier's
        magnitude over its factor is the same however it was scaled against its weights before; one that was scaled by
        less than the ratio stays as it is.

        Args:
            activations: largest magnitude of each channel; likewise `weights`, of what multiplies it.

        Raises:
            InputError: a magnitude is NaN or infinite.
        """
        if not (np.isfinite(activations).all() and np.isfinite(weights).all()):
            raise InputError("SmoothQuant's magnitudes hold NaN or infinity", hint="calibrate again")
        alive = (activations > 0) & (weights > 0)
        factors = np.ones(len(activations))
        if alive.any():
            logarithms = self.alpha * np.log(activations[alive]) - (1 - self.alpha) * np.log(weights[alive])
            logarithms -= np.median(logarithms)
            outliers = np.abs(logarithms) >= np.log(self.outlier_ratio)
            limit = np.log(LARGEST_FACTOR)
            factors[alive] = np.where(outliers, np.exp(np.clip(logarithms, -limit, limit)), 1.0)
        return factors


def parse_smoothing(text: str) -> SmoothingRule | None:
    """Read ``none``, ``0.5`` or ``0.5:4``, alpha and outlier ratio.

    Raises:
        InputError: it is none of these.
    """
    if text == "none":
        return None
    alpha, colon, ratio = text.partition(":")
    try:
        return SmoothingRule(float(alpha), float(ratio) if colon else DEFAULT_OUTLIER_RATIO)
    except ValueError as error:
        raise InputError(
            f"--smooth-quant {text!r} is no number", hint="give alpha from 0 to 1, alpha:outlier ratio, or none"
        ) from error


DEFAULT_SMOOTHING = SmoothingRule()
