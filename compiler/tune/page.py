"""A tuning as an HTML page: quality against time, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sdc.compiler.compare.html_parts import Cell, Column, milliseconds_cell, page, paragraph, section, table, tiles
from sdc.compiler.compare.svg_plot import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, even_axis, grid
from sdc.compiler.precision.budget import Measure
from sdc.compiler.tune.budget import Budget
from sdc.compiler.tune.report import latest, quality_title
from sdc.compiler.tune.search import Measurement, pareto_front
from sdc.compiler.tune.tune import Tuning

_MOST_DB = 60.0
_LIMITS_SHOWN = 4.0


def tuning_page(tuning: Tuning) -> str:
    """The whole page."""
    budget, chosen, found = tuning.request.budget, tuning.chosen, latest(tuning)
    figures = [
        ("speed-up", f"{1 / chosen.ratio:.2f}", f"of a picture, against {tuning.preset.reference}"),
        (quality_title(budget), budget.text(chosen.quality), f"{budget} asked for, {chosen.pictures} pictures"),
    ]
    return page(
        "sdc tune",
        f"<h1>Ways to draw with {escape(str(tuning.request.bundle))}</h1>",
        paragraph(f"{tuning.model}, {tuning.precision}, target {tuning.target}. The preset: {chosen.way}"),
        tiles(figures),
        section(
            "Quality against time",
            paragraph(
                "A point for each way, on most pictures that it was measured on, the preset in the other colour; the "
                "curve joins those that no other beats, the straight line is the budget. Points say what they are when "
                "pointed at; those far outside of the budget lie on the edge."
            ),
            f'<div class="plots"><figure>{pareto_plot(found, budget, chosen)}</figure></div>',
        ),
        section("Ways", _table(found, budget)),
    )


def _table(found: Sequence[Measurement], budget: Budget) -> str:
    columns = [
        Column("way", words=True),
        *(Column(title) for title in ("pictures", quality_title(budget), "±", "PSNR, dB", "ms a picture", "speed-up")),
        Column("within", words=True),
    ]
    rows: list[list[Cell | str]] = [
        [
            str(each.way),
            Cell(str(each.pictures), each.pictures),
            Cell(budget.text(each.quality), each.quality),
            Cell(f"{each.noise:.3f}", each.noise),
            Cell(f"{each.psnr_db:.2f}", each.psnr_db),
            milliseconds_cell(each.seconds),
            Cell(f"{1 / each.ratio:.2f}", 1 / each.ratio),
            "yes" if budget.allows(each.quality) else "no",
        ]
        for each in found
    ]
    return table(columns, rows, name="ways")


def pareto_plot(found: Sequence[Measurement], budget: Budget, chosen: Measurement) -> str:
    """Quality over the part of the reference's time, as SVG, the chosen way in the other colour.

    What is beyond the axis lies on its end: the axis begins at 0 and shows up to some times the limit of a change, and
    up to 60 dB of PSNR.
    """
    highest = _MOST_DB if budget.measure is Measure.PSNR else _LIMITS_SHOWN * budget.limit

    def shown(quality: float) -> float:
        return min(max(quality, 0.0), highest)

    axis, ticks = even_axis([budget.limit, *(shown(each.quality) for each in found)])
    times = even_axis([each.ratio for each in found])[1]

    def x(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ratio / times[-1]

    def place(each: Measurement) -> tuple[float, float]:
        return x(each.ratio), axis.y(shown(each.quality))

    def dot(each: Measurement) -> str:
        left, top = place(each)
        side, radius = ("second", 4.5) if each.way == chosen.way else ("first", 2.6)
        told = f"{each.way}: {budget.text(each.quality)}, {1 / each.ratio:.2f} times as fast"
        return (
            f'<g class="{side}"><circle cx="{left:.1f}" cy="{top:.1f}" r="{radius}"><title>{escape(told)}</title>'
            "</circle></g>"
        )

    front = " ".join(f"{left:.1f},{top:.1f}" for left, top in map(place, pareto_front(found, budget)))
    limit = axis.y(budget.limit)
    marks = "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>' for tick in times
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(quality_title(budget))} over time">'
        f'{grid(axis, ticks)}<text x="{LEFT}" y="12">{escape(quality_title(budget))}</text>'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{limit:.1f}" y2="{limit:.1f}"/>'
        f'<g class="first"><polyline points="{front}"/></g>{"".join(map(dot, found))}{marks}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        "part of the reference's time</text></svg>"
    )
