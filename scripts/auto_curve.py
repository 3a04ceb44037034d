"""Quality against time: `--precision auto` at several budgets beside every uniform precision, on one target.

    python scripts/auto_curve.py --out build/auto-curve --target ort-cpu --budgets 42 46 50 54 58

Prints two tables. The first has every bundle's PSNR to fp32 at equal prompts and seeds, and its time of a step, bundles
in turn. The second has, for each budget, the fastest uniform precision whose pictures are no worse, and how long auto
takes beside it: below 1, no uniform precision does the same.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from unet_steps import ratio_text, time_in_turn

from sdc.compiler.compile import export_bundle
from sdc.compiler.evaluate.evaluate import evaluate
from sdc.compiler.evaluate.opened import opened
from sdc.compiler.evaluate.settings import Settings
from sdc.compiler.export_plan import ExportRequest
from sdc.compiler.precision.budget import Measure, QualityBudget
from sdc.compiler.precision.capabilities import runnable_formats
from sdc.compiler.precision.planning import AUTO, PrecisionRequest
from sdc.compiler.stages import Source
from sdc.compiler.text_table import markdown_row
from sdc.engines.targets import Target, parse_targets
from sdc.passes.pipeline import PRECISIONS

REFERENCE = "fp32"


@dataclass(frozen=True)
class Point:
    """A bundle on the curve.

    Attributes:
        name: its precision, or the budget.
        folder: where it lies.
        psnr_db: mean over pictures, to the reference's.
        worst_db: mean over the worst 5 %.
    """

    name: str
    folder: Path
    psnr_db: float
    worst_db: float

    @property
    def is_auto(self) -> bool:
        """Whether its precisions were chosen by measurement."""
        return self.name.startswith(AUTO)


def main() -> None:
    """Parse the command line, export, evaluate, time and print."""
    parser = argparse.ArgumentParser(description="quality against time of auto and of uniform precisions")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundles")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--target", default="ort-cpu", help="one that runs here")
    parser.add_argument("--budgets", type=float, nargs="+", default=[42.0, 46.0, 50.0, 54.0, 58.0], metavar="DB")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=1.9)
    options = parser.parse_args()
    (target,) = parse_targets(options.target)
    requests = {name: PrecisionRequest(name) for name in PRECISIONS if name in runnable_formats(target)}
    requests |= {
        f"{AUTO} {each:g} dB": PrecisionRequest(AUTO, budget=QualityBudget(Measure.PSNR, each))
        for each in options.budgets
    }
    settings = Settings(samples=options.samples, guidance_scale=options.guidance, target=target.name)
    points = [export_and_compare(name, each, target, options, settings) for name, each in requests.items()]
    with ExitStack() as stack:
        bundles = [stack.enter_context(opened(each.folder, replace(settings, samples=1))) for each in points]
        seconds = time_in_turn(bundles)
    print_points(points, seconds)
    print_comparison(points, seconds)


def export_and_compare(
    name: str, request: PrecisionRequest, target: Target, options: argparse.Namespace, settings: Settings
) -> Point:
    """One bundle; the reference has to be exported before the others."""
    folder = options.out / f"{name.replace(' ', '-')}-{target.name}"
    export_bundle(ExportRequest(Source(options.model), request, (target,), folder))
    found = evaluate(folder, options.out / f"{REFERENCE}-{target.name}", settings)
    row = next(row for row in found.paired if row.name == "psnr_db")
    return Point(name, folder, row.value.value, row.worst_5_percent)


def print_points(points: list[Point], seconds: np.ndarray) -> None:
    """Quality and time of all; times are medians over rounds, ratios are of equal rounds, with quartiles."""
    print(markdown_row("precision", "PSNR, dB", "worst 5 %", "ms a step", "ratio to fp32 (quartiles)"))
    print(markdown_row(*["---"] * 5))
    for place, point in enumerate(points):
        median = f"{1000 * np.median(seconds[:, place]):.2f}"
        ratio = ratio_text(seconds[:, place], seconds[:, 0])
        print(markdown_row(point.name, f"{point.psnr_db:.2f}", f"{point.worst_db:.2f}", median, ratio))


def print_comparison(points: list[Point], seconds: np.ndarray) -> None:
    """Each budget beside the fastest uniform precision that is no worse."""
    print()
    print(markdown_row("budget", "PSNR, dB", "fastest uniform that is no worse", "its PSNR, dB", "auto's time to its"))
    print(markdown_row(*["---"] * 5))
    medians = np.median(seconds, axis=0)
    for place, point in enumerate(points):
        if not point.is_auto:
            continue
        as_good = [i for i, each in enumerate(points) if not each.is_auto and each.psnr_db >= point.psnr_db]
        best = min(as_good, key=lambda index: medians[index])
        ratio = ratio_text(seconds[:, place], seconds[:, best])
        best_db = f"{points[best].psnr_db:.2f}"
        print(markdown_row(point.name, f"{point.psnr_db:.2f}", points[best].name, best_db, ratio))


if __name__ == "__main__":
    main()
