"""DeepCache and guidance at some steps: seconds of steps and of pictures, and what the pictures lose.

    sdc export --model tiny --precision fp32 --target cpu --deepcache --out build/tiny-deepcache
    python scripts/bench_shortcuts.py build/tiny-deepcache --reference build/tiny-deepcache --guidance 1.9
    sdc export --model sd15 --weights random --precision bf16 --target cpu --deepcache --out build/sd15-deepcache
    python scripts/bench_shortcuts.py build/sd15-deepcache --rounds 5 --ways

A way to draw is written INTERVAL[@CENTER][,FIRST:END]: DeepCache's interval, 1 for none; the step around which it is
denser; and the steps that are guided. Whole and shallow steps take turns in one picture. Pictures of all ways are drawn
in turn, one at a time, prompt and decoder included, each way by a pipeline of its own; speed-ups are to the first way.
Distances are to the reference without shortcuts at equal prompts and seeds; Fréchet distances need a model that there
is a judge for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from unet_steps import ratio_text

from sdc.compiler.cli.pictures import step_range
from sdc.compiler.compare.outputs import seconds_in_turn
from sdc.compiler.evaluate.figures import run_figures
from sdc.compiler.evaluate.gather import gather
from sdc.compiler.evaluate.opened import OpenedBundle, opened
from sdc.compiler.evaluate.settings import JUDGED_MODEL, Settings, prompt_triples, prompts_of_model
from sdc.compiler.evaluate.statistics import MODELS_FOLDER, load_statistics
from sdc.compiler.evaluate.verdicts import load_judge
from sdc.compiler.text_table import markdown_row
from sdc.engines.networks import DenoisingStep
from sdc.engines.specs import SHALLOW

NOT_COUNTED = 1
"""Rounds at the start: backends compile and allocate."""

COMPARED = ("paired.psnr_db", "paired.frechet_to_reference")
"""Names of the figures that are shown."""


def main() -> None:
    """Time steps, then pictures, then compare."""
    parser = argparse.ArgumentParser(description="what shortcuts save and cost")
    parser.add_argument("bundle", type=Path, help="exported with --deepcache")
    parser.add_argument("--reference", type=Path, help="bundle to compare the pictures with, in fp32; none is compared")
    parser.add_argument("--ways", nargs="*", default=["1", "2", "3", "5"], metavar="WAY", help="none draws no pictures")
    parser.add_argument("--rounds", type=int, default=15, help="of timed steps, and of timed pictures")
    parser.add_argument("--samples", type=int, default=200, help="pictures that are compared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--target")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    plain = Settings(
        samples=options.samples,
        steps=options.steps,
        guidance_scale=options.guidance,
        target=options.target,
        threads=options.threads,
    )
    ways = {way: settings_of_way(way, plain) for way in options.ways}
    with opened(options.bundle, plain) as bundle:
        print_steps(time_steps(bundle, options.rounds))
    if not ways:
        return
    with ExitStack() as stack:
        bundles = [stack.enter_context(opened(options.bundle, settings)) for settings in ways.values()]
        seconds = time_pictures(bundles, options.rounds)
    figures = [compare(options.bundle, options.reference, settings) for settings in ways.values()]
    print_pictures(list(ways), seconds, figures)


def settings_of_way(way: str, plain: Settings) -> Settings:
    """INTERVAL[@CENTER][,FIRST:END] as settings."""
    cache, _, guided = way.partition(",")
    interval, _, center = cache.partition("@")
    return replace(
        plain,
        deepcache=int(interval),
        deepcache_center=int(center) if center else None,
        guidance_steps=step_range(guided) if guided else None,
    )


def time_steps(bundle: OpenedBundle, rounds: int) -> np.ndarray:
    """Seconds of the engines in the steps of one picture, a whole and a shallow one in turn: [rounds, 2]."""
    told: list[DenoisingStep] = []
    generation = bundle.pipeline.plan(
        prompts_of_model(bundle.manifest.model.name, 1),
        steps=2 * (rounds + NOT_COUNTED),
        guidance_scale=bundle.settings.guidance_scale,
        seed=0,
        deepcache=2,
    )
    bundle.pipeline.denoise(generation, on_step=told.append)
    assert [step.component for step in told] == ["unet", SHALLOW] * (rounds + NOT_COUNTED)
    return np.array([step.seconds for step in told]).reshape(-1, 2)[NOT_COUNTED:]


def time_pictures(bundles: Sequence[OpenedBundle], rounds: int) -> np.ndarray:
    """Seconds of one picture from its prompt, bundles in turn: [rounds, bundles]."""
    prompts = prompts_of_model(bundles[0].manifest.model.name, 1)
    return seconds_in_turn(
        [partial(each.make_pictures, prompts, [0]) for each in bundles], rounds=rounds, warm_ups=NOT_COUNTED
    )


def compare(path: Path, reference: Path | None, settings: Settings) -> dict[str, float]:
    """Figures of a bundle's pictures beside those of the reference; none without one."""
    if reference is None:
        return {}
    judge_path = MODELS_FOLDER / "judge.safetensors"
    triples = prompt_triples(settings.samples)
    with opened(path, settings) as bundle, opened(reference, settings.without_shortcuts()) as wanted:
        model = bundle.manifest.model.name
        judged = model == JUDGED_MODEL
        record = gather(
            prompts_of_model(model, settings.samples),
            settings.picture_seeds(),
            bundle=bundle.make_pictures,
            reference=wanted.make_pictures,
            judge=load_judge(judge_path) if judged else None,
            period=settings.samples,
            batch=min(bundle.largest_batch(), wanted.largest_batch()),
            progress=lambda _: None,
        )
    real = load_statistics(MODELS_FOLDER / "statistics.safetensors", judge_path=judge_path).real if judged else None
    return run_figures(record, triples, real, np.arange(settings.samples))


def print_steps(seconds: np.ndarray) -> None:
    """Medians, and the ratio with its quartiles."""
    whole, shallow = 1000 * np.median(seconds, axis=0)
    ratio = ratio_text(seconds[:, 1], seconds[:, 0])
    print(f"a step of the whole UNet {whole:.2f} ms, of the shallow one {shallow:.2f} ms; ratio {ratio}")
    print()


def print_pictures(ways: Sequence[str], seconds: np.ndarray, figures: Sequence[dict[str, float]]) -> None:
    """A row for each way; times are medians over rounds, speed-ups are of equal rounds, with quartiles."""
    print(markdown_row("way", "s a picture", "speed-up (quartiles)", "PSNR, dB", "Fréchet to the reference's"))
    print(markdown_row(*["---"] * 5))
    for place, (way, found) in enumerate(zip(ways, figures, strict=True)):
        print(
            markdown_row(
                way,
                f"{np.median(seconds[:, place]):.3f}",
                ratio_text(seconds[:, 0], seconds[:, place]),
                *(f"{found[name]:.4g}" if name in found else "" for name in COMPARED),
            )
        )


if __name__ == "__main__":
    main()
