"""torch's CPU random numbers in NumPy, so that a seed gives the very latents that diffusers draws.

Source: PyTorch, ``aten/src/ATen/native/cpu/DistributionTemplates.h`` (``normal_fill``), ``aten/src/ATen/core/
DistributionsHelper.h`` (``normal_distribution``) and ``MT19937RNGEngine.h``; the transform is Box and Muller's (1958).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sdc.engines.errors import InputError

MAXIMUM_SEED = 2**64 - 1

BLOCK = 16
"""torch fills tensors of at least this many values in blocks of this many, and smaller ones in another way."""

DrawNoise = Callable[[tuple[int, ...]], NDArray[np.float32]]
"""Draws standard normal values of a shape from a stream that goes on from call to call."""


class TorchGenerator:
    """The stream of ``torch.Generator("cpu").manual_seed(seed)``; as there, only the seed's low 32 bits count.

    Args:
        seed: from 0 to 2**64 - 1.

    Raises:
        InputError: the seed is outside this range.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed <= MAXIMUM_SEED:
            raise InputError(f"seed {seed} is outside 0 to 2**64 - 1")
        self._mersenne_twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept_normal: float | None = None

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal values as ``torch.randn(shape, generator=...)`` gives them, to a few float32 roundings."""
        count = math.prod(shape)
        if count < BLOCK:
            return np.array([self._normal() for _ in range(count)], np.float32).reshape(shape)
        values = self._uniform(count)
        whole = count // BLOCK * BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole < count:
            values[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return values.reshape(shape)

    def _raw(self, count: int) -> NDArray[np.uint32]:
        return self._mersenne_twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        """float32 values in [0, 1) of 24 random bits each."""
        return (self._raw(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _uniform_double(self) -> float:
        """A value in [0, 1) of 53 random bits."""
        high, low = self._raw(2).tolist()
        return float(((high << 32 | low) & (2**53 - 1)) * 2.0**-53)

    def _normal(self) -> float:
        """One value; they are made in pairs, and the second of a pair is kept for the next call."""
        if self._kept_normal is not None:
            value, self._kept_normal = self._kept_normal, None
            return value
        angle = 2 * math.pi * self._uniform_double()
        radius = math.sqrt(-2 * math.log1p(-self._uniform_double()))
        self._kept_normal = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transform blocks of 16: the first eight values give the radii and the last eight the angles.

    In float32, as torch computes: float64 would be further from its values.
    """
    first, second = np.split(uniform.reshape(-1, BLOCK), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * math.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def noise_of_rows(draw: DrawNoise, rows: slice, count: int) -> DrawNoise:
    """What some rows of a batch get of its noise: `draw` is asked for all `count` rows each time."""
    return lambda shape: draw((count, *shape[1:]))[rows]


def noise_from_seeds(seeds: Sequence[int]) -> DrawNoise:
    """Noise for a batch as diffusers draws it.

    Args:
        seeds: one seed, whose stream fills the whole batch; or one for each picture, so that a picture does not depend
            on the others.
    """
    generators = [TorchGenerator(seed) for seed in seeds]

    def draw(shape: tuple[int, ...]) -> NDArray[np.float32]:
        if len(generators) == 1:
            return generators[0].randn(shape)
        if len(generators) != shape[0]:
            raise InputError(
                f"{len(generators)} seeds were given for {shape[0]} pictures", hint="give one, or one each"
            )
        return np.concatenate([generator.randn((1, *shape[1:])) for generator in generators])

    return draw
