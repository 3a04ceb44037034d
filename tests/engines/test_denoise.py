"""The wrappers between a sampler and the UNet."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import LatentConsistencyModelPipeline
from torch import tensor

from sdc.engines.denoise import DENOISERS, embed_guidance, guide
from sdc.engines.schedule import NoiseLevel, vp_level

SHAPE = (3, 5, 2, 7)
LEVELS = [vp_level(601, 0.37), NoiseLevel(601.5, 1.0, 3.2), NoiseLevel(1.0, 0.4, 0.1)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("level", LEVELS, ids=["variance-preserving", "variance-exploding", "neither"])
def test_a_perfect_network_gives_the_clean_latent(prediction_type: str, level: NoiseLevel) -> None:
    random = np.random.default_rng(2)
    x0, epsilon = random.normal(size=(2, *SHAPE)).astype(np.float32)
    x = (level.alpha * x0 + level.sigma * epsilon).astype(np.float32)
    answers = {
        "epsilon": epsilon,
        "v_prediction": (level.alpha * epsilon - level.sigma * x0) / level.scale,
        "sample": x0,
    }

    def predict(sample: np.ndarray, timestep: float) -> np.ndarray:
        assert timestep == level.timestep
        np.testing.assert_allclose(sample, x / level.scale, rtol=1e-6)
        return answers[prediction_type].astype(np.float32)

    found = DENOISERS[prediction_type](predict)(x, level)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, x0, rtol=0, atol=1e-5)


def test_guidance_extrapolates_from_the_unconditional_half() -> None:
    conditions = np.array([10, 20, 30, 1, 2, 3], np.float32).reshape(6, 1, 1, 1)

    def predict(sample: np.ndarray, timestep: float) -> np.ndarray:
        assert sample.shape == (6, 5, 2, 7)
        return sample * np.float32(timestep) + conditions

    sample = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    expected = sample * np.float32(4) + np.array([10 - 2.5 * 9, 20 - 2.5 * 18, 30 - 2.5 * 27]).reshape(3, 1, 1, 1)
    found = guide(predict, 2.5)(sample, 4.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_step_without_guidance_is_the_conditional_half() -> None:
    asked: list[int] = []

    def predict(sample: np.ndarray, timestep: float) -> np.ndarray:
        asked.append(len(sample))
        return np.arange(len(sample), dtype=np.float32).reshape(-1, 1, 1, 1) + np.zeros_like(sample)

    guided = guide(predict, 3.0, range(1, 2))
    sample = np.zeros(SHAPE, np.float32)
    found = [guided(sample, 4.0)[:, 0, 0, 0].tolist() for _ in range(3)]
    assert asked == [3, 6, 3]
    assert found == [[0, 1, 2], [9, 10, 11], [0, 1, 2]]


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.7, 8.5])
@pytest.mark.parametrize("width", [32, 37, 256])
def test_guidance_embedding_equals_diffusers(guidance_scale: float, width: int) -> None:
    w = tensor([guidance_scale - 1] * 3)
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=width).numpy()
    ours = embed_guidance(guidance_scale, rows=3, width=width)
    assert ours.dtype == np.float32
    # Angles reach 7,500, where float32 has steps of 5e-4; a frequency one rounding apart moves an angle by one.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=6e-4)
