"""Drift of ranges over timesteps, the choice of timesteps, and outlier channels."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
from small_denoiser import make_denoiser, make_table

from sdc.passes.precision.calibration_table import CalibrationTable
from sdc.passes.precision.outliers import find_outliers
from sdc.passes.precision.timestep_drift import (
    choose_timesteps,
    coverage,
    drift_of_tensors,
    relative_magnitudes,
    uniform_timesteps,
)


def table_of(rows: dict[str, list[float]]) -> CalibrationTable:
    table = make_table(make_denoiser(), dict.fromkeys(rows, 1.0))
    count = len(next(iter(rows.values())))
    tensors = {
        name: replace(table.tensors[name], minima=tuple(-0.5 * each for each in row), maxima=tuple(row))
        for name, row in rows.items()
    }
    return replace(table, timesteps=tuple(float(step) for step in range(count, 0, -1)), tensors=tensors)


def test_drift_is_loudest_over_quietest():
    table = table_of({"still": [2.0, 2.0, 2.0], "moving": [1.0, 3.0, 6.0], "dying": [1.0, 0.0, 1.0]})
    assert drift_of_tensors(table) == {"dying": float("inf"), "moving": 6.0, "still": 1.0}
    assert list(drift_of_tensors(table)) == ["dying", "moving", "still"]
    np.testing.assert_allclose(relative_magnitudes(table)[1], [1 / 6, 0.5, 1])


def test_dead_tensors_are_covered_by_any_timestep():
    magnitudes = relative_magnitudes(table_of({"dead": [0.0, 0.0]}))
    assert coverage(magnitudes, np.array([1])) == 1
    assert coverage(magnitudes, np.array([], np.int64)) == 0


def test_choice_is_nearly_the_best_and_no_worse_than_even():
    magnitudes = np.random.default_rng(131).uniform(0, 1, (23, 11)) ** 4
    magnitudes /= magnitudes.max(axis=1, keepdims=True)
    for count in (1, 2, 3):
        chosen = choose_timesteps(magnitudes, count)
        assert len(set(chosen.tolist())) == count
        best = max(coverage(magnitudes, np.array(each)) for each in combinations(range(11), count))
        assert coverage(magnitudes, chosen) >= (1 if count == 1 else 0.9) * best
        assert coverage(magnitudes, chosen) > coverage(magnitudes, uniform_timesteps(11, count))
        fixed = choose_timesteps(magnitudes, count, always=(5,))
        assert (len(set(fixed.tolist())), 5 in fixed) == (count, True)
    assert choose_timesteps(magnitudes, 99).tolist() == list(range(11))


def test_even_timesteps_stand_in_the_middle_of_their_shares():
    assert uniform_timesteps(20, 4).tolist() == [2, 7, 12, 17]
    assert uniform_timesteps(7, 7).tolist() == list(range(7))


def test_outliers_are_far_above_the_median():
    table = make_table(make_denoiser(), {"x": 1.0, "y": 1.0})
    channels = {"x": (0.5, -1.0, 12.0, 1.0, 0.9), "y": (0.0, 0.0, 0.0, 2.0, 1.0)}
    tensors = {
        name: replace(table.tensors[name], channel_minima=tuple(-abs(each) for each in row), channel_maxima=row)
        for name, row in channels.items()
    }
    found = find_outliers(replace(table, tensors=tensors))
    assert [(each.tensor, each.channel) for each in found] == [("y", 3), ("y", 4), ("x", 2)]
    assert found[-1].ratio == 12
    assert find_outliers(replace(table, tensors={"x": tensors["x"]}), ratio=13) == []
