"""Which timesteps to calibrate at: those whose values, together, come closest to those of all."""

from __future__ import annotations

import numpy as np

from sdc.passes.precision.calibration_table import CalibrationTable


def choose_timesteps(seen: CalibrationTable, count: int) -> tuple[int, ...]:
    """Timesteps between which the ranges of activations drift most, one after the other.

    A tensor's range at some timesteps covers a part of its range at all of them. Of all timesteps the one that adds
    most to the parts, summed over tensors, is taken first, and so on; if there is nothing to add, the one that lies
    farthest from those taken. The objective grows less with every timestep taken, so this greedy choice comes close
    to the best one.

    Args:
        seen: a calibration of a few pictures, at every timestep.
        count: timesteps to choose, at most as many as were seen.

    Returns:
        [count], from the noisiest on.
    """
    timesteps = np.asarray(seen.timesteps)
    lows = np.array([each.minima for each in seen.tensors.values()])
    highs = np.array([each.maxima for each in seen.tensors.values()])
    spans = np.maximum(highs.max(axis=1) - lows.min(axis=1), np.finfo(np.float32).tiny)
    low, high = np.full(len(spans), np.inf), np.full(len(spans), -np.inf)
    distances = np.full(len(timesteps), np.inf)
    taken: list[int] = []
    while len(taken) < count:
        covered = np.maximum(highs, high[:, None]) - np.minimum(lows, low[:, None])
        gains = np.round((covered / spans[:, None]).mean(axis=0), 6)
        gains[taken] = -1
        # Ties, as all are once everything is covered, go to the farthest.
        best = max(range(len(timesteps)), key=lambda index: (gains[index], distances[index]))
        taken.append(best)
        low, high = np.minimum(low, lows[:, best]), np.maximum(high, highs[:, best])
        distances = np.minimum(distances, np.abs(timesteps - timesteps[best]))
    return tuple(sorted((int(timesteps[index]) for index in taken), reverse=True))
