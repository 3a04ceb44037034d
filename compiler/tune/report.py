"""What a tuning found, as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdc.compiler.text_table import format_table
from sdc.compiler.tune.budget import FIGURES, Budget
from sdc.compiler.tune.candidates import short_names
from sdc.compiler.tune.search import Measurement
from sdc.compiler.tune.tune import Tuning

TITLES = {
    "change.frechet_to_real": "change of the Fréchet distance",
    "paired.psnr_db": "PSNR to the reference's, dB",
}


def quality_title(budget: Budget) -> str:
    """What the column of the budget's measure is called."""
    return TITLES[FIGURES[budget.measure]]


def latest(tuning: Tuning) -> list[Measurement]:
    """Each bundle's ways, each measured on most pictures, the fastest first."""
    found = {each.drawing: each for each in sorted(tuning.measurements, key=lambda each: each.pictures)}
    return sorted(found.values(), key=lambda each: each.ratio)


def bundle_names(tuning: Tuning) -> Mapping[Path, str]:
    """What bundles are called where several were tuned; empty if there is one, which needs no name."""
    bundles = tuning.request.bundles
    return short_names(bundles) if len(bundles) > 1 else {}


def format_tuning(tuning: Tuning) -> str:
    """A table of all ways, and what was chosen."""
    budget, names = tuning.request.budget, bundle_names(tuning)
    table = format_table(
        [
            *(["bundle"] if names else []),
            "way",
            "pictures",
            quality_title(budget),
            "±",
            "ms a picture",
            "times as fast",
            "within",
        ],
        [
            [
                *([names[each.bundle]] if names else []),
                str(each.way),
                str(each.pictures),
                budget.text(each.quality),
                f"{each.noise:.3f}",
                f"{1000 * each.seconds:.1f}",
                f"{1 / each.ratio:.2f}",
                "yes" if budget.allows(each.quality) else "no",
            ]
            for each in latest(tuning)
        ],
        words=("bundle", "way", "within"),
    )
    chosen = tuning.chosen
    copied = f", a copy of {chosen.bundle}" if names else ""
    return (
        f"{table}\n\n{tuning.request.out} is written{copied}: {tuning.model}, {tuning.precision}, with the preset\n"
        f"  {chosen.way}\n"
        f"{1 / chosen.ratio:.2f} times as fast on {tuning.target} as {tuning.preset.reference_text()}; "
        f"{budget} asked for, {budget.text(chosen.quality)} ± {chosen.noise:.3f} measured on {chosen.pictures} pictures"
    )
