"""Which steps of DeepCache should be whole: what old deep features cost at every step, and the cheapest schedule.

Deep features of step i at a later step j change the clean latent that the network believes in. In x / alpha, a step
from noise-to-signal s to s' moves the sample by (1 - s' / s) of that latent, whatever the network predicts. Later steps
undo part of an error: for latents of unit variance, 1 / sqrt(1 + s'^2) of it is left in the last one. Errors of steps
that share features have one cause and may add up; costs are their sums.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdc.compiler.evaluate.opened import OpenedBundle
from sdc.compiler.evaluate.settings import prompts_of_model
from sdc.engines.denoise import DENOISERS, Latents, guide
from sdc.engines.generation import Generation, takes_two_batches
from sdc.engines.networks import DenoisingStep
from sdc.engines.pipeline import Pipeline
from sdc.engines.samplers import find_sampler
from sdc.engines.schedule import NoiseLevel, Transition
from sdc.engines.specs import SHALLOW
from sdc.engines.unet import Feeds
from sdc.engines.wiring import PREDICTION, SAMPLE, cached_tensors

Costs = NDArray[np.float64]
"""[steps, steps]: of drawing the step of the column with the deep features of the row's; 0 but above the diagonal."""


def measure_costs(pipeline: Pipeline, generation: Generation) -> Costs:
    """What old deep features cost: root mean squares over all values of the last latents.

    One run of the sampler with the whole UNet at each step, and the shallow one for every pair of steps.

    Args:
        pipeline: of a bundle that was exported with DeepCache.
        generation: pictures that are denoised at once, without shortcuts.
    """
    assert generation.full_steps is None, "the costs are those of leaving whole steps out"
    assert generation.guidance_steps is None, "all steps are of one size"
    assert len(generation.groups) == 1, "the steps are counted"
    whole, shallow = pipeline.networks.session("unet"), pipeline.networks.session(SHALLOW)
    cached = cached_tensors(pipeline.networks.specs["unet"], shallow.spec)
    taken = {tensor.name for tensor in shallow.spec.inputs} - set(cached)
    transitions = find_sampler(generation.sampler).plan(pipeline.schedule, generation.steps).transitions
    clean = _CleanLatents(pipeline, generation)
    features: list[Feeds] = []
    costs = np.zeros((len(transitions), len(transitions)))

    def add_step(step: DenoisingStep) -> None:
        outputs = whole.run(step.feeds)
        transition = transitions[step.index]
        wanted = clean.of(step, outputs[PREDICTION], transition[0])
        others = {name: value for name, value in step.feeds.items() if name in taken}
        for earlier, old in enumerate(features):
            found = clean.of(step, shallow.run({**others, **old})[PREDICTION], transition[0])
            error = np.sqrt(np.mean(np.square(found - wanted, dtype=np.float64)))
            costs[earlier, step.index] = weight_of_step(transition) * error
        features.append({name: outputs[name] for name in cached})

    pipeline.denoise(generation, on_step=add_step)
    return costs


def mean_costs(bundle: OpenedBundle) -> Costs:
    """`measure_costs` over all pictures of an evaluation's settings, which are without shortcuts."""
    settings, batch = bundle.settings, bundle.largest_batch()
    prompts, seeds = prompts_of_model(bundle.manifest.model.name, settings.samples), settings.picture_seeds()
    parts = [
        measure_costs(bundle.pipeline, bundle.plan(prompts[begin : begin + batch], seeds[begin : begin + batch]))
        for begin in range(0, len(prompts), batch)
    ]
    return np.asarray(np.mean(parts, axis=0))


class _CleanLatents:
    """The clean latents that raw predictions stand for, guidance applied."""

    def __init__(self, pipeline: Pipeline, generation: Generation) -> None:
        self._denoiser = DENOISERS[pipeline.schedule.prediction_type]
        self._guided = takes_two_batches(generation.guidance_scale, pipeline.settings)
        self._scale = generation.guidance_scale

    def of(self, step: DenoisingStep, prediction: Latents, level: NoiseLevel) -> Latents:
        """[N, C, H, W], of a raw prediction for what the UNet got at a step."""

        def predict(_sample: Latents, _timestep: float) -> Latents:
            return prediction

        sample = np.asarray(step.feeds[SAMPLE], np.float32) * np.float32(level.scale)
        if not self._guided:
            return self._denoiser(predict)(sample, level)
        return self._denoiser(guide(predict, self._scale))(np.split(sample, 2)[0], level)


def weight_of_step(transition: Transition) -> float:
    """How much of an error of a step's clean latent is in the last one, for latents of unit variance."""
    now, then = transition
    return (1 - (then.sigma * now.alpha) / (then.alpha * now.sigma)) * (then.alpha / math.hypot(then.alpha, then.sigma))


def cheapest_full_steps(costs: Costs, count: int) -> tuple[int, ...]:
    """The steps to run the whole UNet at, by dynamic programming over the last of them.

    Args:
        costs: from `measure_costs`.
        count: of whole steps, from 1 to the number of steps.

    Returns:
        From 0 and in order; the features of each serve until the next.
    """
    steps = len(costs)
    assert 1 <= count <= steps
    # [i, k]: the features of step i serve the steps after it up to, not including, step k.
    served = np.concatenate([np.zeros((steps, 1)), np.cumsum(costs, axis=1)], axis=1)
    is_before = np.arange(steps)[:, None] < np.arange(steps + 1)
    served[~is_before] = np.inf
    least = served[0]  # [k]: the least that the steps before k cost, so far with one whole step
    last_before: list[NDArray[np.int64]] = []
    for _ in range(count - 1):
        candidates = least[:-1, None] + served  # [i, k]: with i as the last whole step before k
        last_before.append(np.argmin(candidates, axis=0))
        least = np.min(candidates, axis=0)
    chosen, end = [], steps
    for last in reversed(last_before):
        end = int(last[end])
        chosen.append(end)
    return (0, *reversed(chosen))
