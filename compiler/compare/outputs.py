"""The same seeded inputs through two engines: how far their outputs lie apart, and what each call costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from sdc.compiler.evaluate.metrics import relative_rms_error
from sdc.engines.errors import InputError
from sdc.engines.specs import ComponentSpec

WARM_UPS = 2
TIMESTEP = 501.0
"""In the middle of Stable Diffusion's thousand."""

LARGEST_TOKEN = 100
"""Token ids are drawn below it; every vocabulary is larger."""


@dataclass(frozen=True)
class OutputDifference:
    """Two engines' values of one output.

    Attributes:
        name: of the output.
        shape: of both.
        largest: largest absolute difference; ``mean`` the mean of all.
        relative_rms: root mean square of the difference over that of the first engine's values.
        scale: largest absolute value of the first engine's.
    """

    name: str
    shape: tuple[int, ...]
    largest: float
    mean: float
    relative_rms: float
    scale: float


@dataclass(frozen=True)
class Timing:
    """Calls of two engines in turn, so that a busy machine slows both.

    Attributes:
        first_seconds: median of the first engine's calls; likewise ``second_seconds``.
        ratio: median over rounds of the second's time by the first's of the same round.
        lowest_ratio: of a quarter of the rounds the ratio is below; ``highest_ratio`` of a quarter above.
        rounds: calls of each.
    """

    first_seconds: float
    second_seconds: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    rounds: int


def draw_feeds(spec: ComponentSpec, *, seed: int) -> dict[str, np.ndarray]:
    """Inputs of a component at the sizes that it is tuned for.

    Normal numbers for what is noise, a timestep in the middle, token ids from the beginning of the vocabulary. What an
    input gets depends on its name, not on its place among the others.

    Raises:
        InputError: an input has an element type that no value can be drawn for.
    """
    feeds: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        random = np.random.default_rng([seed, crc32(tensor.name.encode())])
        shape = tuple(size if isinstance(size, int) else spec.dimensions[size].optimum for size in tensor.shape)
        if tensor.name == "timestep":
            feeds[tensor.name] = np.full(shape, TIMESTEP, tensor.dtype)
        elif tensor.dtype in ("int64", "int32"):
            feeds[tensor.name] = random.integers(0, LARGEST_TOKEN, shape).astype(tensor.dtype)
        elif tensor.dtype in ("float32", "float16", "float64"):
            feeds[tensor.name] = random.standard_normal(shape).astype(tensor.dtype)
        else:
            raise InputError(f"the input {tensor.name} is of type {tensor.dtype}, for which no values can be drawn")
    return feeds


def compare_outputs(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> tuple[OutputDifference, ...]:
    """Differences of outputs of one name.

    Raises:
        InputError: the two have no output in common, or the shapes of one differ.
    """
    common = [name for name in first if name in second]
    if not common:
        raise InputError(f"no output in common: {', '.join(first)} and {', '.join(second)}")
    return tuple(_difference(name, first[name], second[name]) for name in common)


def _difference(name: str, first: np.ndarray, second: np.ndarray) -> OutputDifference:
    if first.shape != second.shape:
        raise InputError(f"the output {name} has the shapes {list(first.shape)} and {list(second.shape)}")
    apart = np.abs(first.astype(np.float64) - second.astype(np.float64))
    return OutputDifference(
        name=name,
        shape=tuple(first.shape),
        largest=float(apart.max()),
        mean=float(apart.mean()),
        relative_rms=relative_rms_error(second, first),
        scale=float(np.abs(first).max()),
    )


def seconds_in_turn(calls: Sequence[Callable[[], object]], *, rounds: int, warm_ups: int = WARM_UPS) -> np.ndarray:
    """Times of several calls, one after the other in every round: [rounds, len(calls)], seconds.

    Each is called `warm_ups` times before, untimed. None is always the first of a round.
    """
    for call in calls:
        for _ in range(warm_ups):
            call()
    seconds = np.empty((rounds, len(calls)))
    for index in range(rounds):
        for place in range(len(calls)):
            which = (index + place) % len(calls)
            begin = time.perf_counter()
            calls[which]()
            seconds[index, which] = time.perf_counter() - begin
    return seconds


def timing_from_seconds(first: np.ndarray, second: np.ndarray) -> Timing:
    """Medians and the ratio of times taken in turn: [rounds] each, seconds."""
    ratios = second / first
    return Timing(
        first_seconds=float(np.median(first)),
        second_seconds=float(np.median(second)),
        ratio=float(np.median(ratios)),
        lowest_ratio=float(np.quantile(ratios, 0.25)),
        highest_ratio=float(np.quantile(ratios, 0.75)),
        rounds=len(ratios),
    )
