"""DeepCache's schedules at equal numbers of whole steps: even, around the best centre, and measured.

    sdc export --model tiny --precision fp32 --target ort-cpu --deepcache --out build/tiny-deepcache
    python scripts/deepcache_schedules.py build/tiny-deepcache --guidance 1.9 --intervals 2 3 5

Costs are measured on pictures of other seeds than those that are compared. Of all centres the one whose pictures have
the least squared error with these other seeds is taken. PSNR and Fréchet distance are to the pictures with every
step whole, at equal prompts and seeds. `--report` also keeps the costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench_shortcuts import COMPARED, compare

from sdc.compiler.evaluate.cache_errors import cheapest_full_steps, mean_costs
from sdc.compiler.evaluate.opened import opened
from sdc.compiler.evaluate.settings import Settings, prompts_of_model
from sdc.compiler.text_table import markdown_row
from sdc.engines.deepcache import CacheSchedule, full_steps

MEASURED_RUN = 1
"""Seed of the run that costs are measured on; the pictures that are compared are of run 0."""

HEADINGS = ("schedule", "whole steps", "PSNR, dB", "Fréchet to whole steps'", "which")


def main() -> None:
    """Measure costs, find schedules, compare their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="exported with --deepcache")
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 5], help="whose numbers of whole steps")
    parser.add_argument("--measured", type=int, default=32, help="pictures that costs are measured on")
    parser.add_argument("--samples", type=int, default=500, help="pictures that are compared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--target")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--report", type=Path, help="the costs as a NumPy file")
    options = parser.parse_args()
    whole = Settings(
        samples=options.samples,
        steps=options.steps,
        guidance_scale=options.guidance,
        target=options.target,
        threads=options.threads,
    )
    learnt = replace(whole, samples=options.measured, seed=MEASURED_RUN)
    with opened(options.bundle, learnt) as bundle:
        costs = mean_costs(bundle)
    if options.report is not None:
        np.save(options.report, costs)
    print(markdown_row(*HEADINGS), markdown_row(*["---"] * len(HEADINGS)), sep="\n", flush=True)
    for interval in options.intervals:
        count = len(full_steps(options.steps, interval))
        center = best_center(options.bundle, learnt, interval)
        schedules: dict[str, tuple[CacheSchedule, int | None]] = {
            f"every {interval}": (interval, None),
            f"every {interval} around step {center}": (interval, center),
            "measured": (cheapest_full_steps(costs, count), None),
        }
        for name, (schedule, around) in schedules.items():
            settings = replace(whole, deepcache=schedule, deepcache_center=around)
            found = compare(options.bundle, options.bundle, settings)
            steps = sorted(full_steps(options.steps, schedule, around))
            shown = (f"{found[key]:.4g}" for key in COMPARED if key in found)
            print(markdown_row(name, str(len(steps)), *shown, ", ".join(map(str, steps))), flush=True)


def best_center(path: Path, learnt: Settings, interval: int) -> int:
    """The centre whose pictures are nearest to those with every step whole."""
    with opened(path, learnt) as bundle:
        prompts, seeds = prompts_of_model(bundle.manifest.model.name, learnt.samples), learnt.picture_seeds()
        batch = bundle.largest_batch()

        def pictures(draw: Callable[[Sequence[str], Sequence[int]], np.ndarray]) -> np.ndarray:
            return np.concatenate(
                [draw(prompts[i : i + batch], seeds[i : i + batch]) for i in range(0, len(prompts), batch)]
            )

        wanted = pictures(bundle.make_pictures)
        count = len(full_steps(learnt.steps, interval))
        errors = {}
        for center in range(learnt.steps):
            if len(full_steps(learnt.steps, interval, center)) == count:
                settings = replace(learnt, deepcache=interval, deepcache_center=center)
                found = pictures(replace(bundle, settings=settings).make_pictures)
                errors[center] = float(np.mean(np.square(found - wanted)))
    return min(errors, key=errors.__getitem__)


if __name__ == "__main__":
    main()
