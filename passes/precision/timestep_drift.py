"""How ranges move along the denoising, and the few timesteps that show most of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdc.passes.precision.calibration_table import CalibrationTable


def relative_magnitudes(table: CalibrationTable) -> NDArray[np.float64]:
    """The largest magnitude of each tensor at each timestep, over its largest of all: [tensors, timesteps], 0 to 1."""
    rows = np.array([each.magnitudes for each in table.tensors.values()], np.float64)
    rows = rows.reshape(len(table.tensors), len(table.timesteps))
    largest = rows.max(axis=1, keepdims=True)
    return np.asarray(np.divide(rows, largest, out=np.ones_like(rows), where=largest > 0))


def drift_of_tensors(table: CalibrationTable) -> dict[str, float]:
    """The largest magnitude of all timesteps over that of the quietest one, by tensor; the most moving first."""
    smallest = relative_magnitudes(table).min(axis=1)
    drifts = {
        name: float(1 / low) if low > 0 else float("inf") for name, low in zip(table.tensors, smallest, strict=True)
    }
    return dict(sorted(drifts.items(), key=lambda item: (-item[1], item[0])))


def coverage(magnitudes: NDArray[np.float64], chosen: NDArray[np.int64]) -> float:
    """The share of its range that a tensor shows at the chosen timesteps, averaged over tensors.

    Args:
        magnitudes: as `relative_magnitudes` gives them.
        chosen: numbers of timesteps.
    """
    return float(magnitudes[:, chosen].max(axis=1).mean()) if len(chosen) else 0.0


def choose_timesteps(magnitudes: NDArray[np.float64], count: int, *, always: Sequence[int] = ()) -> NDArray[np.int64]:
    """Numbers of `count` timesteps that cover the ranges, ascending; each is the best addition to those before it.

    Args:
        magnitudes: as `relative_magnitudes` gives them.
        count: timesteps to choose; all of them if there are fewer.
        always: numbers of timesteps that are taken before any other.

    Source: Nemhauser, Wolsey and Fisher, "An analysis of approximations for maximizing submodular set functions", 1978:
    greedy choices reach 1 - 1/e of the best coverage at least.
    """
    covered = np.zeros(len(magnitudes))
    chosen: list[int] = []
    for place in range(min(count, magnitudes.shape[1])):
        gains = np.maximum(magnitudes, covered[:, None]).mean(axis=0)
        gains[chosen] = -1
        best = always[place] if place < len(always) else int(np.argmax(gains))
        chosen.append(best)
        covered = np.maximum(covered, magnitudes[:, best])
    return np.array(sorted(chosen), np.int64)


def uniform_timesteps(steps: int, count: int) -> NDArray[np.int64]:
    """Numbers of `count` timesteps, evenly spread, each in the middle of its share."""
    return np.asarray(((np.arange(count) + 0.5) * steps / count).astype(np.int64))
