"""Histograms of fixed size against sorting all values."""

from __future__ import annotations

import numpy as np
import pytest

from sdc.passes.precision.log_histogram import BINS, LogHistogram


def values(seed: int = 61, count: int = 4001) -> np.ndarray:
    """Twelve decades of both signs, and zeros."""
    random = np.random.default_rng(seed)
    found = random.normal(size=count) * 10.0 ** random.uniform(-6, 6, count)
    found[::97] = 0
    return found.astype(np.float32)


def histogram_of(*parts: np.ndarray) -> LogHistogram:
    found = LogHistogram()
    for part in parts:
        found.add(part)
    return found


def test_parts_add_up_exactly():
    x = values()
    whole = histogram_of(x)
    assert whole == histogram_of(x[:1000].reshape(10, 100), x[1000:])
    merged = histogram_of(x[:1000])
    merged.merge(histogram_of(x[1000:]))
    assert merged == whole
    assert whole != histogram_of(x[1:])
    assert whole.total == len(x)


def test_size_does_not_depend_on_the_values():
    small, large = histogram_of(values(count=7)), histogram_of(*(values(seed) for seed in range(20)))
    assert small._counts.nbytes == large._counts.nbytes == 8 * BINS


def test_filled_bins_hold_everything():
    found = histogram_of(values())
    assert LogHistogram.from_filled(*found.filled()) == found
    assert len(found.filled()[0]) < 4001


def test_bins_stand_in_the_order_of_the_numbers():
    x = values()
    density = histogram_of(x).density(float(x.min()), float(x.max()))
    assert density.total == len(x)
    assert (density.begins[0], density.ends[-1]) == (x.min(), x.max())
    assert (density.begins <= density.ends).all()
    assert (density.ends[:-1] <= density.begins[1:]).all()
    widths = density.ends - density.begins
    magnitudes = np.maximum(np.abs(density.begins), np.abs(density.ends))
    assert (widths <= magnitudes / 127 + 1e-38).all()


@pytest.mark.parametrize("point", [-1e5, -3.7, -1e-3, 0.011, 0.5, 2.25, 999.0])
def test_counts_below_a_point_are_those_of_the_values(point: float):
    x = values()
    density = histogram_of(x).density(float(x.min()), float(x.max()))
    near = np.abs(x - point) <= abs(point) / 127  # the bin that holds the point
    assert abs(density.below(np.array([point]))[0] - (x < point).sum()) <= near.sum()


def test_magnitudes_are_folded():
    x = values()
    density = histogram_of(x).density(float(x.min()), float(x.max())).folded()
    assert density.total == len(x)
    assert density.begins.min() >= 0
    assert density.ends.max() == np.abs(x).max()
