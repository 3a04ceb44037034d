"""What stands between a sampler and the UNet: each layer wraps a function, and no sampler knows of it.

A sampler calls ``denoise(x, level)`` and gets the clean latent that the network believes in. Below it,
``predict(sample, timestep)`` is the network in its own terms: a sample of unit variance in; epsilon, v or the clean
sample out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdc.engines.schedule import NoiseLevel

Latents = NDArray[np.floating[Any]]
"""[N, C, H, W], float32."""

Predict = Callable[[Latents, float], Latents]
"""The network: (sample, timestep) -> its raw prediction, of the sample's shape. A sample that has fewer rows than the
network's conditions goes with the last ones."""

Denoise = Callable[[Latents, NoiseLevel], Latents]
"""(x at a noise level, that level) -> estimate of x0, of the same shape."""


def guide(predict: Predict, guidance_scale: float, steps: Container[int] | None = None) -> Predict:
    """Classifier-free guidance around a network whose conditions are [unconditional, conditional], 2N rows.

    Source: Ho and Salimans, arXiv:2207.12598, equation 6, with Imagen's weight (arXiv:2205.11487, equation 2), at which
    1 means no guidance; in a limited interval: Kynkäänniemi et al., arXiv:2404.07724.

    Args:
        predict: the network.
        guidance_scale: the weight.
        steps: indices of the calls that are guided; the others give the conditional prediction, of N rows. None for
            all.
    """
    indices = count()

    def guided(sample: Latents, timestep: float) -> Latents:
        index = next(indices)
        if steps is not None and index not in steps:
            return predict(sample, timestep)
        unconditional, conditional = np.split(predict(np.concatenate([sample, sample]), timestep), 2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided


def denoise_from_epsilon(predict: Predict) -> Denoise:
    """x0 from a network that predicts the noise; Ho et al., arXiv:2006.11239, equation 15."""

    def denoise(x: Latents, level: NoiseLevel) -> Latents:
        epsilon = predict(x / level.scale, level.timestep)
        return (x - level.sigma * epsilon) / level.alpha

    return denoise


def denoise_from_v(predict: Predict) -> Denoise:
    """x0 from a network that predicts v = alpha epsilon - sigma x0; Salimans and Ho, arXiv:2202.00512, section 4."""

    def denoise(x: Latents, level: NoiseLevel) -> Latents:
        scale = level.scale
        v = predict(x / scale, level.timestep)
        return (level.alpha / scale**2) * x - (level.sigma / scale) * v

    return denoise


def denoise_from_sample(predict: Predict) -> Denoise:
    """x0 from a network that predicts it."""

    def denoise(x: Latents, level: NoiseLevel) -> Latents:
        return predict(x / level.scale, level.timestep)

    return denoise


DENOISERS: dict[str, Callable[[Predict], Denoise]] = {
    "epsilon": denoise_from_epsilon,
    "v_prediction": denoise_from_v,
    "sample": denoise_from_sample,
}
"""By prediction type."""


def embed_guidance(guidance_scale: float, *, rows: int, width: int) -> NDArray[np.float32]:
    """The guidance weight as a UNet's ``timestep_cond`` takes it: sinusoids of 1000 (guidance - 1).

    Source: Luo et al., "Latent Consistency Models", arXiv:2310.04378, section 4.2; the embedding is that of Kingma et
    al., arXiv:2107.00630 (``get_timestep_embedding`` in google-research/vdm). In float32, as diffusers computes it: the
    angles are so large that their rounding shows.

    Args:
        guidance_scale: in Imagen's form, 1 meaning none.
        rows: pictures.
        width: the UNet's ``time_cond_proj_dim``.

    Returns:
        [rows, width], float32.
    """
    half = width // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / (half - 1)))
    angles = np.float32(guidance_scale - 1) * np.float32(1000) * frequencies
    embedding = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2, np.float32)])
    return np.tile(embedding, (rows, 1))
