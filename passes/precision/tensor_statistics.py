"""What calibration keeps of one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdc.passes.precision.log_histogram import LogHistogram
from sdc.passes.precision.packed_arrays import pack, unpack
from sdc.passes.precision.range_rules import Range


@dataclass(frozen=True)
class ChannelRanges:
    """Smallest and largest value of each channel of a tensor, over all runs."""

    minima: tuple[float, ...]
    maxima: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""
        return {"minima": pack(np.array(self.minima, np.float32)), "maxima": pack(np.array(self.maxima, np.float32))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ChannelRanges:
        """Read what `to_json` wrote; raises as `TensorStatistics.from_json`."""
        return cls(tuple(unpack(value["minima"]).tolist()), tuple(unpack(value["maxima"]).tolist()))


@dataclass(frozen=True)
class TensorStatistics:
    """Values of one tensor over all runs.

    Attributes:
        minima: the smallest value at each timestep; likewise ``maxima``.
        channel_minima: the smallest value of each channel, over all timesteps; likewise ``channel_maxima``.
        channel_means: the mean of each channel, over all runs.
        histogram: of an even part of the values.
    """

    minima: tuple[float, ...]
    maxima: tuple[float, ...]
    channel_minima: tuple[float, ...]
    channel_maxima: tuple[float, ...]
    channel_means: tuple[float, ...]
    histogram: LogHistogram

    @property
    def seen(self) -> Range:
        """The smallest and the largest of all values; NaN if one of them is."""
        return Range(float(np.min(self.minima)), float(np.max(self.maxima)))

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The largest magnitude at each timestep."""
        return tuple(max(-low, high) for low, high in zip(self.minima, self.maxima, strict=True))

    @property
    def channel_magnitudes(self) -> np.ndarray:
        """The largest magnitude of each channel, float64."""
        return np.asarray(np.maximum(-np.asarray(self.channel_minima), np.asarray(self.channel_maxima)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""
        keys, counts = self.histogram.filled()
        return {
            "minima": list(self.minima),
            "maxima": list(self.maxima),
            "channel_minima": pack(np.array(self.channel_minima, np.float32)),
            "channel_maxima": pack(np.array(self.channel_maxima, np.float32)),
            "channel_means": pack(np.array(self.channel_means, np.float32)),
            "histogram": {"bins": pack(keys.astype(np.uint16)), "counts": pack(counts)},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorStatistics:
        """Read what `to_json` wrote.

        Raises:
            KeyError: an entry is missing; likewise TypeError and ValueError for what is malformed.
        """
        histogram = value["histogram"]
        return cls(
            minima=tuple(map(float, value["minima"])),
            maxima=tuple(map(float, value["maxima"])),
            channel_minima=tuple(unpack(value["channel_minima"]).tolist()),
            channel_maxima=tuple(unpack(value["channel_maxima"]).tolist()),
            channel_means=tuple(unpack(value["channel_means"]).tolist()),
            histogram=LogHistogram.from_filled(
                unpack(histogram["bins"]).astype(np.int64), unpack(histogram["counts"]).astype(np.int64)
            ),
        )
