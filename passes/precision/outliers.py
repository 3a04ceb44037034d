"""Channels that one scale for a whole tensor serves badly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdc.passes.precision.calibration_table import CalibrationTable

DEFAULT_RATIO = 10.0
"""A channel this many times the median one costs the others more than 3 of their 8 bits."""


@dataclass(frozen=True)
class Outlier:
    """A channel far larger than the others of its tensor.

    Attributes:
        tensor: its name.
        channel: its number.
        magnitude: the largest that was seen in it.
        ratio: that over the median channel's; infinite if most channels are dead.
    """

    tensor: str
    channel: int
    magnitude: float
    ratio: float


def find_outliers(table: CalibrationTable, *, ratio: float = DEFAULT_RATIO) -> list[Outlier]:
    """Channels whose largest magnitude is more than `ratio` times the tensor's median, the worst first."""
    found = []
    for name, statistics in table.tensors.items():
        magnitudes = statistics.channel_magnitudes
        median = float(np.median(magnitudes))
        for channel in np.flatnonzero(magnitudes > ratio * median):
            magnitude = float(magnitudes[channel])
            found.append(Outlier(name, int(channel), magnitude, magnitude / median if median else float("inf")))
    return sorted(found, key=lambda each: (-each.ratio, each.tensor, each.channel))
