"""A histogram of fixed size for any number of any float32 values, which needs no range in advance.

The bins are the upper 16 bits of a float32: sign, exponent and 7 bits of the mantissa, which are the numbers of
bfloat16. A bin's width is at most 1/128 of its values, from the smallest magnitude to the largest. So one pass is
enough, two histograms add up exactly, and no value is ever outside.

Why not `onnxruntime.quantization.calibrate.HistogramCollector`: its linear bins are laid out by the first batch, later
batches that reach further widen them, and merging two of them moves counts between bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

BINS = 2**16

_SIGN = 2**15
_FINITE = 0x7F80
"""Magnitudes from here on are infinities and NaN. Source: IEEE 754-2019, binary32."""


class LogHistogram:
    """Counts by the upper 16 bits of values; 512 kB, however many values are added."""

    def __init__(self, counts: NDArray[np.int64] | None = None) -> None:
        self._counts = np.zeros(BINS, np.int64) if counts is None else counts

    def add(self, values: np.ndarray) -> None:
        """Count float32 values of any shape."""
        bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
        self._counts += np.bincount(bits >> 16, minlength=BINS)

    def merge(self, other: LogHistogram) -> None:
        """Count what another histogram has counted."""
        self._counts += other._counts

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self._counts.sum())

    def filled(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The bins that are not empty, ascending by their bits, and their counts."""
        keys = np.flatnonzero(self._counts)
        return keys, self._counts[keys]

    @classmethod
    def from_filled(cls, keys: NDArray[np.int64], counts: NDArray[np.int64]) -> LogHistogram:
        """The inverse of `filled`."""
        every = np.zeros(BINS, np.int64)
        every[keys] = counts
        return cls(every)

    def density(self, low: float, high: float) -> Density:
        """The filled bins in the order of the numbers.

        Args:
            low: the smallest value that was seen, exactly; the first bin begins there.
            high: likewise the largest.
        """
        begins, ends, order = _edges()
        counts = self._counts[order]
        filled = np.flatnonzero(counts)
        return Density(
            np.clip(begins[filled], low, high), np.clip(ends[filled], low, high), counts[filled].astype(np.float64)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogHistogram) and np.array_equal(self._counts, other._counts)


@dataclass(frozen=True)
class Density:
    """Bins that are not empty, ascending; values lie evenly within each.

    Attributes:
        begins: [bins], float64; where each begins.
        ends: likewise.
        counts: likewise, values in each.
    """

    begins: NDArray[np.float64]
    ends: NDArray[np.float64]
    counts: NDArray[np.float64]

    @property
    def total(self) -> float:
        """Number of values."""
        return float(self.counts.sum())

    def below(self, points: np.ndarray) -> NDArray[np.float64]:
        """Number of values below each of ascending `points`."""
        # Between two filled bins the sum stays where it is: both their edges are points of the curve.
        places = np.stack([self.begins, self.ends], axis=1).reshape(-1)
        upto = np.cumsum(self.counts)
        sums = np.stack([upto - self.counts, upto], axis=1).reshape(-1)
        return np.asarray(np.interp(points, places, sums), np.float64)

    def folded(self) -> Density:
        """The same of the values' magnitudes."""
        swapped = self.ends <= 0
        begins = np.where(swapped, -self.ends, self.begins)
        ends = np.where(swapped, -self.begins, self.ends)
        order = np.lexsort((ends, begins))
        return Density(begins[order], ends[order], self.counts[order])


@cache
def _edges() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Where each finite bin begins and ends, and its bits, in the order of the numbers."""
    edges = (np.arange(_FINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    edges[-1] = 2.0**128
    magnitudes = np.arange(_FINITE)
    begins = np.concatenate([-edges[:0:-1], edges[:-1]])
    ends = np.concatenate([-edges[-2::-1], edges[1:]])
    return begins, ends, np.concatenate([(magnitudes + _SIGN)[::-1], magnitudes])
