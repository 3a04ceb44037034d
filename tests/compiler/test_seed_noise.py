"""The spread over seeds, estimated from one run."""

from __future__ import annotations

import numpy as np
import pytest

from sdc.compiler.evaluate.frechet import Gaussian, frechet_distance
from sdc.compiler.evaluate.seed_noise import seed_noise


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(6).standard_normal(1000)
    noise = seed_noise(lambda index: {"mean": float(values[index].mean())}, 1000)["mean"]
    groups = values.reshape(10, 100).mean(axis=1)
    assert noise == pytest.approx(groups.std(ddof=1) / np.sqrt(10), rel=1e-9)


def test_jackknife_predicts_the_spread_of_the_frechet_distance_over_seeds() -> None:
    """One estimate is good to a quarter, the spread of 60 runs to a tenth; twelve estimates are averaged."""
    width, count = 9, 400
    mix = np.random.default_rng(7).standard_normal((width, width))
    target = Gaussian(np.full(width, 0.3), np.eye(width), 10**6)

    def distance(vectors: np.ndarray) -> float:
        return frechet_distance(Gaussian.fit(vectors), target)

    runs = [np.random.default_rng(100 + i).standard_normal((count, width)) @ mix for i in range(60)]
    spread = np.std([distance(vectors) for vectors in runs], ddof=1)
    estimates = [
        seed_noise(lambda index, vectors=vectors: {"d": distance(vectors[index])}, count)["d"]  # type: ignore[misc]
        for vectors in runs[:12]
    ]
    assert np.sqrt(np.mean(np.square(estimates))) == pytest.approx(spread, rel=0.35)


def test_noise_is_not_told_from_three_pictures() -> None:
    assert seed_noise(lambda index: {"mean": float(index.mean())}, 3) == {}
