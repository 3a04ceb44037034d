"""Two UNets over the steps of a denoising run: on the same latents at every step, and left to themselves.

On the same latents, each step's error is the networks' own. Left to themselves, errors of earlier steps come back in
the latents, damped or grown; that is what the pictures show.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sdc.compiler.compare.outputs import Timing, timing_from_seconds
from sdc.compiler.evaluate.opened import OpenedBundle
from sdc.engines.denoise import DENOISERS, Denoise, Latents, Predict, embed_guidance, guide
from sdc.engines.errors import InputError
from sdc.engines.generation import Generation, takes_two_batches
from sdc.engines.noise import noise_from_seeds
from sdc.engines.samplers import find_sampler
from sdc.engines.schedule import NoiseLevel


@dataclass(frozen=True)
class DenoisingStep:
    """One step, over all pictures.

    Attributes:
        timestep: in training steps.
        epsilon: relative root mean square of the difference of the UNets' raw predictions on the first side's latents.
        drift: likewise of the latents that the two sides have before this step when each follows its own predictions.
        first_seconds: median time of the first side's UNet; likewise ``second_seconds``.
    """

    timestep: float
    epsilon: float
    drift: float
    first_seconds: float
    second_seconds: float


@dataclass(frozen=True)
class Denoising:
    """A whole comparison of denoising runs.

    Attributes:
        steps: in order.
        final_drift: of the latents that go to the decoder.
        timing: of a step: all calls of both UNets in turn, on the same latents.
    """

    steps: tuple[DenoisingStep, ...]
    final_drift: float
    timing: Timing


class DenoisingRecorder:
    """Runs both sides for batches of pictures and gathers figures over the steps.

    Args:
        first: whose trajectory and prompts' encodings both UNets are given.
        second: the other side.
    """

    def __init__(self, first: OpenedBundle, second: OpenedBundle) -> None:
        self._first = first
        self._second = second
        self._warm = False
        self._timesteps: list[float] = []
        self._epsilon: list[np.ndarray] = []
        self._drift: list[np.ndarray] = []
        self._seconds: list[np.ndarray] = []

    def run(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Latents, Latents]:
        """The clean latents of one batch on each side, each side following its own predictions.

        Raises:
            InputError: a side cannot take what the other one can.
        """
        generation = self._first.plan(prompts, seeds)
        states = self._first.pipeline.encode_prompts(generation)
        if not self._warm:
            self._warm_up(generation, states)
        both = _Both(*(_predictor(side, generation, states) for side in (self._first, self._second)))
        path: list[Latents] = []
        first = _sample(self._first, generation, both, path.append)
        own_generation = self._second.plan(prompts, seeds)
        own = _predictor(self._second, own_generation, self._second.pipeline.encode_prompts(own_generation))
        own_path: list[Latents] = []
        second = _sample(self._second, own_generation, own, own_path.append)
        if first.shape != second.shape:
            raise InputError(f"the latents have the shapes {first.shape} and {second.shape}", hint="compare one model")
        self._timesteps = both.timesteps
        self._epsilon.append(np.array(both.squares))
        self._seconds.append(np.array(both.seconds))
        pairs = zip([*path, first], [*own_path, second], strict=True)
        self._drift.append(np.array([_squares(one, other) for one, other in pairs]))
        return first, second

    def result(self) -> Denoising:
        """The figures over all batches that were run."""
        epsilon = _relative(sum(self._epsilon))
        drift = _relative(sum(self._drift))
        seconds = np.stack(self._seconds)  # [batches, steps, 2]
        medians = np.median(seconds, axis=0)
        steps = [
            DenoisingStep(timestep, float(epsilon[i]), float(drift[i]), float(medians[i, 0]), float(medians[i, 1]))
            for i, timestep in enumerate(self._timesteps)
        ]
        calls = seconds.reshape(-1, 2)
        return Denoising(tuple(steps), float(drift[-1]), timing_from_seconds(calls[:, 0], calls[:, 1]))

    def _warm_up(self, generation: Generation, states: np.ndarray) -> None:
        """The first call of an engine is slower than the others; it is not timed."""
        for side in (self._first, self._second):
            sample = np.zeros((len(states), *_shape(side, generation)[1:]), np.float32)
            _predictor(side, generation, states)(sample, 1.0)
        self._warm = True


class _Both:
    """Predicts with the first network, and asks the second one the same."""

    def __init__(self, first: Predict, second: Predict) -> None:
        self._networks = (first, second)
        self.timesteps: list[float] = []
        self.squares: list[tuple[float, float]] = []
        self.seconds: list[list[float]] = []

    def __call__(self, sample: Latents, timestep: float) -> Latents:
        found: list[Latents] = [sample, sample]
        seconds = [0.0, 0.0]
        # Neither is always the one that finds warm caches.
        for which in (0, 1) if len(self.timesteps) % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            found[which] = self._networks[which](sample, timestep)
            seconds[which] = time.perf_counter() - begin
        self.timesteps.append(timestep)
        self.squares.append(_squares(found[0], found[1]))
        self.seconds.append(seconds)
        return found[0]


def _predictor(side: OpenedBundle, generation: Generation, states: np.ndarray) -> Predict:
    """The bare UNet of a side with its conditions, without guidance."""
    conditions = {"encoder_hidden_states": states}
    width = side.manifest.pipeline.time_cond_proj_dim
    if width is not None:
        conditions["timestep_cond"] = embed_guidance(generation.guidance_scale, rows=len(generation), width=width)
    return side.pipeline.networks.predictor(conditions, steps=generation.steps)


def _guided(side: OpenedBundle, generation: Generation) -> bool:
    return takes_two_batches(generation.guidance_scale, side.manifest.pipeline)


def _shape(side: OpenedBundle, generation: Generation) -> tuple[int, int, int, int]:
    settings = side.manifest.pipeline
    height, width = (size // settings.vae_reduction for size in (generation.height_px, generation.width_px))
    return len(generation), settings.latent_channels, height, width


def _sample(
    side: OpenedBundle, generation: Generation, predict: Predict, on_latents: Callable[[Latents], None]
) -> Latents:
    """`Pipeline.denoise` with any network, and with a look at the latents before every step."""
    schedule = side.pipeline.schedule
    sampler = find_sampler(generation.sampler, eta=generation.eta)
    trajectory = sampler.plan(schedule, generation.steps)
    guided = guide(predict, generation.guidance_scale) if _guided(side, generation) else predict
    denoise: Denoise = DENOISERS[schedule.prediction_type](guided)

    def watched(x: Latents, level: NoiseLevel) -> Latents:
        on_latents(x)
        return denoise(x, level)

    draw_noise = noise_from_seeds(generation.seeds)  # what a sampler adds later comes after the first noise
    start = draw_noise(_shape(side, generation)) * np.float32(trajectory.start_scale)
    return sampler.sample(watched, start, trajectory.transitions, draw_noise)


def _squares(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Sums of squares of the difference and of the first."""
    if first.shape != second.shape:
        raise InputError(f"the UNets gave the shapes {first.shape} and {second.shape}", hint="compare one model")
    difference = first.astype(np.float64) - second
    return float(np.square(difference).sum()), float(np.square(first, dtype=np.float64).sum())


def _relative(squares: np.ndarray | int) -> np.ndarray:
    """[steps, 2] sums of squares to [steps] relative root mean squares."""
    sums = np.asarray(squares, np.float64)
    return np.asarray(np.sqrt(sums[:, 0] / np.maximum(sums[:, 1], np.finfo(np.float64).tiny)))
