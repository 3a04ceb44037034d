"""Both UNets along one trajectory and each along its own: the pipelines' own runs are the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from whole_bundle import write_whole_bundle

from sdc.compiler.compare.denoising import DenoisingRecorder
from sdc.compiler.compare.pictures import compare_pictures
from sdc.compiler.evaluate.metrics import relative_rms_error
from sdc.compiler.evaluate.opened import OpenedBundle, opened
from sdc.compiler.evaluate.settings import Settings
from sdc.engines.errors import InputError

PROMPTS, SEEDS = ["a cat", "two dogs"], [5, 9]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("denoising")
    return write_whole_bundle(folder / "first"), write_whole_bundle(folder / "second", noise=0.05)


@pytest.fixture(params=[("ddim", 3.0), ("euler", 1.0), ("dpmpp-2m", 3.0), ("lcm", 1.0)], ids=lambda each: each[0])
def sides(request: pytest.FixtureRequest, paths: tuple[Path, Path]) -> Iterator[list[OpenedBundle]]:
    sampler, guidance = request.param
    settings = Settings(samples=2, steps=4, sampler=sampler, guidance_scale=guidance, target="ort-cpu", threads=1)
    with ExitStack() as stack:
        yield [stack.enter_context(opened(path, settings)) for path in paths]


def test_each_side_draws_what_its_pipeline_draws(sides: list[OpenedBundle]) -> None:
    latents = DenoisingRecorder(*sides).run(PROMPTS, SEEDS)
    for side, found in zip(sides, latents, strict=True):
        np.testing.assert_array_equal(found, side.pipeline.denoise(side.plan(PROMPTS, SEEDS)))
    assert relative_rms_error(latents[1], latents[0]) > 1e-3


def test_both_networks_get_the_first_sides_latents(sides: list[OpenedBundle]) -> None:
    """The samples of the first side's own run, given to the second network, have the errors that are told."""
    first, second = sides
    recorder = DenoisingRecorder(first, second)
    recorder.run(PROMPTS, SEEDS)
    steps: list[tuple[float, np.ndarray, np.ndarray, np.ndarray]] = []
    first.pipeline.denoise(
        first.plan(PROMPTS, SEEDS),
        on_step=lambda step: steps.append(
            (step.timestep, step.feeds["sample"], step.feeds["encoder_hidden_states"], step.output)  # type: ignore[arg-type]
        ),
    )
    found = recorder.result().steps
    assert [step.timestep for step in found] == [timestep for timestep, *_ in steps]
    for step, (timestep, sample, states, output) in zip(found, steps, strict=True):
        wanted = relative_rms_error(second.predict_noise(sample, timestep, states), output)
        assert step.epsilon == pytest.approx(wanted, rel=1e-6)


def test_batches_are_gathered(sides: list[OpenedBundle]) -> None:
    """Two pictures one by one give the figures of both at once: sums of squares, not means of ratios."""
    together, apart = DenoisingRecorder(*sides), DenoisingRecorder(*sides)
    wanted = [together.run(PROMPTS, SEEDS)]
    found = [apart.run([prompt], [seed]) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    for side in (0, 1):
        np.testing.assert_allclose(
            np.concatenate([each[side] for each in found]), wanted[0][side], rtol=1e-4, atol=1e-5
        )
    one, other = together.result(), apart.result()
    for left, right in zip(one.steps, other.steps, strict=True):
        assert right.epsilon == pytest.approx(left.epsilon, rel=1e-4)
        assert right.drift == pytest.approx(left.drift, rel=1e-3, abs=1e-9)
    assert (one.timing.rounds, other.timing.rounds) == (4, 8)


def test_drift_is_that_of_the_latents(sides: list[OpenedBundle]) -> None:
    recorder = DenoisingRecorder(*sides)
    first, second = recorder.run(PROMPTS, SEEDS)
    samples: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for side, own in zip(sides, samples, strict=True):
        side.pipeline.denoise(side.plan(PROMPTS, SEEDS), on_step=lambda step, own=own: own.append(step.feeds["sample"]))  # type: ignore[misc]
    found = recorder.result()
    assert found.steps[0].drift == 0
    for step, one, other in zip(found.steps, *samples, strict=True):
        assert step.drift == pytest.approx(relative_rms_error(other, one), rel=1e-4)
    assert found.final_drift == pytest.approx(relative_rms_error(second, first), rel=1e-6)


def test_prompts_are_used_in_turn(paths: tuple[Path, Path]) -> None:
    settings = Settings(samples=5, steps=2, target="ort-cpu", threads=1, batch=2)
    said: list[str] = []
    _, comparison, pairs = compare_pictures(*paths, settings, prompts=["x", "y"], say=said.append)
    assert comparison.prompts == ("x", "y", "x", "y", "x")
    assert comparison.seeds == tuple(settings.picture_seeds())
    assert pairs.first.shape == pairs.second.shape == (5, 3, 32, 32)
    assert said == ["pictures 1 to 2 of 5", "pictures 3 to 4 of 5", "pictures 5 to 5 of 5"]


def test_networks_of_other_sizes_are_refused(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(samples=1, steps=2, target="ort-cpu", threads=1)
    with opened(paths[0], settings) as first, opened(paths[1], settings) as second:
        real = second.pipeline.networks.predictor

        def cut(*arguments: object, **keywords: object) -> object:
            predict = real(*arguments, **keywords)  # type: ignore[arg-type]
            return lambda sample, timestep: predict(sample, timestep)[:, :1]

        monkeypatch.setattr(second.pipeline.networks, "predictor", cut)
        with pytest.raises(InputError, match="gave the shapes"):
            DenoisingRecorder(first, second).run(["x"], [1])
