"""DeepCache of one bundle: seconds of a whole and of a shallow step, of pictures, and what the pictures lose.

    sdc export --model tiny --precision fp32 --target cpu --deepcache --out build/tiny-deepcache
    python scripts/bench_deepcache.py build/tiny-deepcache --reference build/tiny-deepcache --guidance 1.9
    sdc export --model sd15 --weights random --precision bf16 --target cpu --deepcache --out build/sd15-deepcache
    python scripts/bench_deepcache.py build/sd15-deepcache --rounds 5 --intervals

Whole and shallow steps take turns in one picture. Pictures of all intervals are drawn in turn, one at a time, prompt
and decoder included; speed-ups are to the first interval. Distances are to the reference without DeepCache at equal
prompts and seeds; Fréchet distances need a model that there is a judge for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from unet_steps import ratio_text

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
    parser = argparse.ArgumentParser(description="what DeepCache saves and costs")
    parser.add_argument("bundle", type=Path, help="exported with --deepcache")
    parser.add_argument("--reference", type=Path, help="bundle to compare the pictures with, in fp32; none is compared")
    parser.add_argument(
        "--intervals", type=int, nargs="*", default=[1, 2, 3, 5], metavar="N", help="none draws no pictures"
    )
    parser.add_argument("--center", type=int, metavar="STEP", help="space whole steps around this one")
    parser.add_argument("--rounds", type=int, default=15, help="of timed steps, and of timed pictures")
    parser.add_argument("--samples", type=int, default=200, help="pictures that are compared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--target")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    settings = Settings(
        samples=options.samples,
        steps=options.steps,
        guidance_scale=options.guidance,
        target=options.target,
        threads=options.threads,
    )
    with opened(options.bundle, settings) as bundle:
        print_steps(time_steps(bundle, options.rounds))
        if not options.intervals:
            return
        seconds = time_pictures(bundle, options)
        figures = [compare(bundle, options.reference, options, each) for each in options.intervals]
    print_pictures(options.intervals, seconds, figures)


def with_deepcache(bundle: OpenedBundle, interval: int, center: int | None) -> OpenedBundle:
    """The same pipeline, whose pictures are drawn with DeepCache."""
    settings = replace(bundle.settings, deepcache=interval, deepcache_center=None if interval == 1 else center)
    return replace(bundle, settings=settings)


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


def time_pictures(bundle: OpenedBundle, options: argparse.Namespace) -> np.ndarray:
    """Seconds of one picture from its prompt, intervals in turn: [rounds, intervals]."""
    prompts = prompts_of_model(bundle.manifest.model.name, 1)
    calls = [
        partial(with_deepcache(bundle, each, options.center).make_pictures, prompts, [0]) for each in options.intervals
    ]
    return seconds_in_turn(calls, rounds=options.rounds, warm_ups=NOT_COUNTED)


def compare(
    bundle: OpenedBundle, reference: Path | None, options: argparse.Namespace, interval: int
) -> dict[str, float]:
    """Figures of the pictures beside those of the reference; none without one."""
    if reference is None:
        return {}
    model, settings = bundle.manifest.model.name, bundle.settings
    judge_path = MODELS_FOLDER / "judge.safetensors"
    judged = model == JUDGED_MODEL
    triples = prompt_triples(settings.samples)
    with opened(reference, settings) as wanted:
        record = gather(
            prompts_of_model(model, settings.samples),
            settings.picture_seeds(),
            bundle=with_deepcache(bundle, interval, options.center).make_pictures,
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


def print_pictures(intervals: Sequence[int], seconds: np.ndarray, figures: Sequence[dict[str, float]]) -> None:
    """A row for each interval; times are medians over rounds, speed-ups are of equal rounds, with quartiles."""
    print(markdown_row("interval", "s a picture", "speed-up (quartiles)", "PSNR, dB", "Fréchet to the reference's"))
    print(markdown_row(*["---"] * 5))
    for place, (interval, found) in enumerate(zip(intervals, figures, strict=True)):
        print(
            markdown_row(
                str(interval),
                f"{np.median(seconds[:, place]):.3f}",
                ratio_text(seconds[:, 0], seconds[:, place]),
                *(f"{found[name]:.4g}" if name in found else "" for name in COMPARED),
            )
        )


if __name__ == "__main__":
    main()
