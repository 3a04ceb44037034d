"""What a tuning found, as text."""

from __future__ import annotations

from sdc.compiler.text_table import format_table
from sdc.compiler.tune.budget import FIGURES, Budget
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
    """Each way's measurement on most pictures, the fastest first."""
    found = {each.way: each for each in sorted(tuning.measurements, key=lambda each: each.pictures)}
    return sorted(found.values(), key=lambda each: each.ratio)


def format_tuning(tuning: Tuning) -> str:
    """A table of all ways, and what was chosen."""
    budget = tuning.request.budget
    table = format_table(
        ["way", "pictures", quality_title(budget), "±", "ms a picture", "times as fast", "within"],
        [
            [
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
        words=("within",),
    )
    chosen = tuning.chosen
    return (
        f"{table}\n\n{tuning.request.out} is written: {tuning.model}, {tuning.precision}, with the preset\n"
        f"  {chosen.way}\n"
        f"{1 / chosen.ratio:.2f} times as fast as {tuning.preset.reference} on {tuning.target}; {budget} asked for, "
        f"{budget.text(chosen.quality)} ± {chosen.noise:.3f} measured on {chosen.pictures} pictures"
    )
