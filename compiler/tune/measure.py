"""What ways are worth: pictures beside the reference's at equal prompts and seeds, and times beside it, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from sdc.compiler.compare.outputs import seconds_in_turn
from sdc.compiler.evaluate.cache_errors import Costs, cheapest_full_steps, mean_costs
from sdc.compiler.evaluate.figures import run_figures
from sdc.compiler.evaluate.gather import PictureMaker, gather
from sdc.compiler.evaluate.metrics import PSNR_CEILING_DB
from sdc.compiler.evaluate.opened import OpenedBundle, opened
from sdc.compiler.evaluate.seed_noise import seed_noise
from sdc.compiler.evaluate.settings import JUDGED_MODEL, Settings, prompt_triples, prompts_of_model
from sdc.compiler.evaluate.statistics import MODELS_FOLDER, load_statistics
from sdc.compiler.evaluate.stored_runs import stored_pictures
from sdc.compiler.evaluate.verdicts import load_judge
from sdc.compiler.tune.budget import FIGURES, Budget
from sdc.compiler.tune.candidates import Candidate
from sdc.compiler.tune.search import Measurement
from sdc.compiler.workshop.progress import StageLog
from sdc.engines.bundle import open_bundle
from sdc.engines.preset import Way

WARM_UPS = 1
"""Pictures before those that are timed: backends compile and allocate."""

COST_PICTURES = 8
"""That a schedule of DeepCache is measured on, of another run than those that are compared."""


def way_of_settings(settings: Settings) -> Way:
    """How an evaluation draws."""
    return Way(
        settings.sampler,
        settings.steps,
        settings.guidance_scale,
        settings.guidance_steps,
        settings.deepcache,
        settings.deepcache_center,
    )


def settings_of_way(way: Way, settings: Settings) -> Settings:
    """An evaluation that draws so."""
    return replace(
        settings,
        sampler=way.sampler,
        steps=way.steps,
        guidance_scale=way.guidance_scale,
        guidance_steps=way.guidance_steps,
        deepcache=way.deepcache,
        deepcache_center=way.deepcache_center,
    )


@dataclass(frozen=True)
class Bench:
    """Measures ways to draw, with any bundle, beside one reference.

    Attributes:
        settings: of the reference; ``samples`` are all pictures.
        reference: the bundle that draws it, opened to do so; it is timed beside every way.
        pictures: looks up those that it drew, which all others are compared with.
        budget: whose figure is wanted.
        rounds: of timed pictures.
        stages: is told of every measurement.
    """

    settings: Settings
    reference: OpenedBundle
    pictures: PictureMaker
    budget: Budget
    rounds: int
    stages: StageLog

    def measure(self, candidate: Candidate, way: Way, pictures: int) -> Measurement:
        """Draw pictures in a way, one at a time for the clock first, then as many at once as the engines take.

        Raises:
            NumericalError: an engine gave NaN or infinity.
        """
        path = candidate.path
        with self.stages.stage(f"{candidate.title}{way}, {pictures} pictures"):
            if path.resolve() == self.reference.path.resolve() and way == way_of_settings(self.settings):
                alone = float(np.median(self._time([self.reference])))
                return Measurement(path, way, pictures, self.budget.best(), 0.0, PSNR_CEILING_DB, alone, 1.0)
            with opened(path, replace(settings_of_way(way, self.settings), samples=pictures)) as bundle:
                seconds = self._time([self.reference, bundle])
                found = compare_with(
                    bundle,
                    self.pictures,
                    FIGURES[self.budget.measure],
                    progress=lambda done: self.stages.progress.advance(done, pictures),
                )
            ratio = float(np.median(seconds[:, 1] / seconds[:, 0]))
            return Measurement(path, way, pictures, *found, float(np.median(seconds[:, 1])), ratio)

    def _time(self, bundles: Sequence[OpenedBundle]) -> np.ndarray:
        """Seconds of one picture from its prompt: [rounds, bundles]."""
        prompts = prompts_of_model(self.reference.manifest.model.name, 1)
        seeds = self.settings.picture_seeds()[:1]
        calls = [partial(each.make_pictures, prompts, seeds) for each in bundles]
        return seconds_in_turn(calls, rounds=self.rounds, warm_ups=WARM_UPS)


def compare_with(
    bundle: OpenedBundle, reference: PictureMaker, figure: str, *, progress: Callable[[int], None]
) -> tuple[float, float, float]:
    """A figure of a bundle's pictures beside a reference's at equal prompts and seeds, once over them.

    Args:
        bundle: draws as many pictures as its settings say.
        reference: gives the others.
        figure: one of `run_figures`'s.
        progress: told how many pictures are done.

    Returns:
        The figure, its standard deviation over seeds (0 where that cannot be told), and the mean PSNR in dB.
    """
    count, model = bundle.settings.samples, bundle.manifest.model.name
    judge_path = MODELS_FOLDER / "judge.safetensors"
    judged = model == JUDGED_MODEL
    record = gather(
        prompts_of_model(model, count),
        bundle.settings.picture_seeds(),
        bundle=bundle.make_pictures,
        reference=reference,
        judge=load_judge(judge_path) if judged else None,
        period=count,
        batch=batch_of(bundle),
        progress=progress,
    )
    real = load_statistics(MODELS_FOLDER / "statistics.safetensors", judge_path=judge_path).real if judged else None
    figures = partial(run_figures, record, prompt_triples(count), real)
    found = figures(np.arange(count))
    return found[figure], seed_noise(figures, count).get(figure, 0.0), found["paired.psnr_db"]


def batch_of(bundle: OpenedBundle) -> int:
    """Pictures that are made at once."""
    largest = bundle.largest_batch()
    return largest if bundle.settings.batch is None else min(largest, bundle.settings.batch)


@contextmanager
def opened_bench(
    reference: Path,
    settings: Settings,
    *,
    budget: Budget,
    rounds: int,
    folder: Path,
    stages: StageLog,
) -> Iterator[Bench]:
    """Draw the reference's pictures and open what measures others beside them.

    Args:
        reference: bundle whose pictures and times all others are compared with.
        settings: how it draws them.
        budget: what pictures have to keep to.
        rounds: of timed pictures.
        folder: keeps the reference's pictures, and has them if they were drawn before.
        stages: is told of what is done.
    """
    prompts = prompts_of_model(open_bundle(reference).manifest.model.name, settings.samples)
    with stages.stage(f"reference, {settings.samples} pictures"), opened(reference, settings) as wanted:
        look_up = stored_pictures(
            folder / "reference.npy",
            wanted.make_pictures,
            prompts,
            settings.picture_seeds(),
            batch=batch_of(wanted),
            progress=lambda done: stages.progress.advance(done, settings.samples),
        )
    with opened(reference, settings) as beside:
        yield Bench(settings, beside, look_up, budget, rounds, stages)


class MeasuredSchedules:
    """DeepCache's schedules by measured costs, each way's costs measured when they are first asked for."""

    def __init__(self, candidate: Candidate, settings: Settings, stages: StageLog) -> None:
        self._candidate = candidate
        self._settings = replace(settings, samples=min(COST_PICTURES, settings.samples), seed=settings.seed + 1)
        self._stages = stages
        self._costs: dict[Way, Costs] = {}

    def __call__(self, way: Way, count: int) -> tuple[int, ...]:
        """The `count` steps to run the whole UNet at; `way` is without shortcuts."""
        if way not in self._costs:
            with (
                self._stages.stage(f"{self._candidate.title}costs of DeepCache, {way}"),
                opened(self._candidate.path, settings_of_way(way, self._settings)) as bundle,
            ):
                self._costs[way] = mean_costs(bundle)
        return cheapest_full_steps(self._costs[way], count)
