"""Errors of a UNet at each timestep, for networks whose error is known."""

import numpy as np
import pytest

from sdc.compiler.evaluate.epsilon import epsilon_rows
from sdc.engines.schedule import Schedule


def test_epsilon_error_of_a_scaled_network_is_its_scale() -> None:
    random = np.random.default_rng(12)
    latents, states = random.standard_normal((9, 4, 6, 5), np.float32), random.standard_normal((9, 7, 3), np.float32)
    schedule = Schedule(np.linspace(0.999, 0.01, 100))

    def network(sample: np.ndarray, timestep: float, states: np.ndarray) -> np.ndarray:
        return sample * np.float32(1 + timestep / 100) + states.mean()

    def scaled(sample: np.ndarray, timestep: float, states: np.ndarray) -> np.ndarray:
        return 1.07 * network(sample, timestep, states)

    rows = epsilon_rows(
        scaled, network, latents=latents, encoder_hidden_states=states, schedule=schedule, seed=1, timesteps=4
    )
    assert [row.timestep for row in rows] == [12, 37, 62, 87]
    for row in rows:
        assert row.error == pytest.approx(0.07, rel=1e-5)
        assert row.noise is not None
        assert row.noise < 1e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_network_that_knows_the_truth_has_no_loss(prediction_type: str) -> None:
    """The clean latents are zero, so that every target follows from the sample."""
    latents = np.zeros((3, 4, 5, 7), np.float32)
    schedule = Schedule(np.linspace(0.99, 0.1, 50), prediction_type=prediction_type)

    def network(sample: np.ndarray, timestep: float, states: np.ndarray) -> np.ndarray:
        level = schedule.level(int(timestep))
        noise = sample / level.sigma
        return {"epsilon": noise, "v_prediction": level.alpha * noise, "sample": 0 * sample}[prediction_type]

    states = np.zeros((3, 2, 2), np.float32)
    rows = epsilon_rows(
        network, None, latents=latents, encoder_hidden_states=states, schedule=schedule, seed=2, timesteps=3
    )
    assert all(row.bundle_loss < 1e-10 and row.error is None for row in rows)
