"""`sdc eval`: one bundle's pictures against real ones, and against a reference's at equal prompts and seeds."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from sdc.compiler.evaluate.epsilon import EpsilonRow, epsilon_rows
from sdc.compiler.evaluate.evaluation import Evaluation, summarize
from sdc.compiler.evaluate.gather import Progress, Record, gather
from sdc.compiler.evaluate.opened import OpenedBundle, opened
from sdc.compiler.evaluate.settings import (
    GENERAL_PROMPTS,
    JUDGED_MODEL,
    TRIPLES,
    Settings,
    prompt_triples,
    prompts_of_model,
    prompts_of_triples,
)
from sdc.compiler.evaluate.statistics import MODELS_FOLDER, Statistics, load_statistics
from sdc.compiler.evaluate.verdicts import load_judge
from sdc.compiler.tiny.judge import Judge
from sdc.engines.errors import InputError

log = logging.getLogger(__name__)

LATENTS_OF_OTHER_MODELS = 4
"""Clean latents for the epsilon error where no encoded real pictures are at hand: the reference's own."""


def evaluate(
    bundle: Path,
    reference: Path | None,
    settings: Settings,
    *,
    models_folder: Path = MODELS_FOLDER,
    noise_seeds: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Make the pictures of a bundle, and of a reference if there is one, and measure them.

    The same bundles on the same machine give the same figures.

    Args:
        bundle: the bundle to evaluate.
        reference: the bundle to compare it with, of the same model and usually of higher precision.
        settings: how the pictures are made; the reference's without shortcuts.
        models_folder: holds ``judge.safetensors`` and ``statistics.safetensors``.
        noise_seeds: whole runs with other seeds to measure the seed noise with; 0 estimates it from the one run.
        progress: told after every batch how many pictures of how many are done.

    Raises:
        InputError: there is nothing to compare with, or the two bundles do not make pictures of one size.
    """
    with ExitStack() as stack:
        made = stack.enter_context(opened(bundle, settings))
        wanted = None if reference is None else stack.enter_context(opened(reference, settings.without_shortcuts()))
        judge, statistics = _load_judgement(made, models_folder)
        _check_comparable(made, wanted, judge)
        settings = replace(settings, batch=_choose_batch(made, wanted))
        prompts = prompts_of_model(made.manifest.model.name, settings.samples)
        triples = prompt_triples(settings.samples)
        period = TRIPLES if judge else len(GENERAL_PROMPTS)
        runs = [replace(settings, seed=settings.seed + index) for index in range(1 + noise_seeds)]
        records = _run(made, wanted, judge, prompts, runs, period=period, progress=progress)
        absolute, paired, method = summarize(records, triples, statistics, period=period)
        return Evaluation(
            bundle=made.describe(),
            reference=None if wanted is None else wanted.describe(),
            settings=settings,
            noise_method=method,
            absolute=absolute,
            paired=paired,
            epsilon=_epsilon(made, wanted, statistics),
        )


def _run(
    made: OpenedBundle,
    wanted: OpenedBundle | None,
    judge: Judge | None,
    prompts: list[str],
    runs: list[Settings],
    *,
    period: int,
    progress: Progress | None,
) -> list[Record]:
    """Make and look at the pictures of every run; runs differ in their seeds."""
    total = len(runs) * len(prompts)
    return [
        gather(
            prompts,
            run.picture_seeds(),
            bundle=made.make_pictures,
            reference=None if wanted is None else wanted.make_pictures,
            judge=judge,
            period=period,
            batch=run.batch or 1,
            progress=partial(_tell, progress, index * len(prompts), total),
        )
        for index, run in enumerate(runs)
    ]


def _tell(progress: Progress | None, before: int, total: int, done: int) -> None:
    if progress is not None:
        progress(before + done, total)


def _load_judgement(made: OpenedBundle, folder: Path) -> tuple[Judge | None, Statistics | None]:
    """The judge and its statistics, for models that they are made for."""
    if made.manifest.model.name != JUDGED_MODEL:
        log.info("no judge knows the pictures of %s: only distances to the reference", made.manifest.model.name)
        return None, None
    judge_path = folder / "judge.safetensors"
    return load_judge(judge_path), load_statistics(folder / "statistics.safetensors", judge_path=judge_path)


def _check_comparable(made: OpenedBundle, wanted: OpenedBundle | None, judge: Judge | None) -> None:
    if wanted is None:
        if judge is None:
            raise InputError(
                f"the pictures of {made.manifest.model.name} can only be compared with those of a reference",
                hint=f"give one with --reference; accuracies and real pictures are known for {JUDGED_MODEL} only",
            )
        return
    ours, theirs = made.manifest.pipeline, wanted.manifest.pipeline
    for name in ("default_height_px", "default_width_px", "latent_channels", "vae_reduction"):
        if getattr(ours, name) != getattr(theirs, name):
            raise InputError(
                f"{made.path} and {wanted.path} are of different models: {name} is {getattr(ours, name)} and "
                f"{getattr(theirs, name)}",
                hint="give a reference of the same model",
            )


def _choose_batch(made: OpenedBundle, wanted: OpenedBundle | None) -> int:
    largest = min(each.largest_batch() for each in (made, wanted) if each is not None)
    return largest if made.settings.batch is None else min(largest, made.settings.batch)


def _epsilon(made: OpenedBundle, wanted: OpenedBundle | None, statistics: Statistics | None) -> tuple[EpsilonRow, ...]:
    """The UNets on the same latents and prompts; both get the reference's text embeddings."""
    source = made if wanted is None else wanted
    if statistics is not None:
        latents, prompts = statistics.latents, prompts_of_triples(statistics.triples)
    else:
        prompts = prompts_of_model(source.manifest.model.name, min(LATENTS_OF_OTHER_MODELS, source.largest_batch()))
        seeds = replace(source.settings, samples=len(prompts)).picture_seeds()
        latents = source.pipeline.denoise(source.plan(prompts, seeds))
    return epsilon_rows(
        made.predict_noise,
        None if wanted is None else wanted.predict_noise,
        latents=np.asarray(latents, np.float32),
        encoder_hidden_states=source.pipeline.encode(prompts),
        schedule=source.pipeline.schedule,
        seed=source.settings.seed,
    )
