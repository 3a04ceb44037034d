"""A tuning as an HTML page: quality against time, and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from sdc.compiler.compare.html_parts import Cell, Column, milliseconds_cell, page, paragraph, section, table, tiles
from sdc.compiler.compare.svg_plot import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, even_axis, grid
from sdc.compiler.precision.budget import Measure
from sdc.compiler.tune.budget import Budget
from sdc.compiler.tune.report import bundle_names, latest, quality_title
from sdc.compiler.tune.search import Measurement, pareto_front
from sdc.compiler.tune.tune import Tuning

_MOST_DB = 60.0
_LIMITS_SHOWN = 4.0

_LEGEND_LINE = 15
"""Pixels."""


def tuning_page(tuning: Tuning) -> str:
    """The whole page."""
    budget, chosen, found, names = tuning.request.budget, tuning.chosen, latest(tuning), bundle_names(tuning)
    shapes = ", each bundle's in its shape" if names else ""
    figures = [
        ("speed-up", f"{1 / chosen.ratio:.2f}", f"of a picture, against {tuning.preset.reference_text()}"),
        (quality_title(budget), budget.text(chosen.quality), f"{budget} asked for, {chosen.pictures} pictures"),
    ]
    return page(
        "sdc tune",
        f"<h1>Ways to draw with {escape(', '.join(map(str, tuning.request.bundles)))}</h1>",
        paragraph(
            f"{f'{names[chosen.bundle]} is chosen: ' if names else ''}{tuning.model}, {tuning.precision}, target "
            f"{tuning.target}. The preset: {chosen.way}"
        ),
        tiles(figures),
        section(
            "Quality against time",
            paragraph(
                f"A point for each way{shapes}, on most pictures that it was measured on, the preset in the other "
                "colour; the curve joins those that no other beats, the straight line is the budget. Points say what "
                "they are when pointed at; those far outside of the budget lie on the edge."
            ),
            f'<div class="plots"><figure>{pareto_plot(found, budget, chosen, names)}</figure></div>',
        ),
        section("Ways", _table(found, budget, names)),
    )


def _table(found: Sequence[Measurement], budget: Budget, names: Mapping[Path, str]) -> str:
    columns = [
        *([Column("bundle", words=True)] if names else []),
        Column("way", words=True),
        *(Column(title) for title in ("pictures", quality_title(budget), "±", "PSNR, dB", "ms a picture", "speed-up")),
        Column("within", words=True),
    ]
    rows: list[list[Cell | str]] = [
        [
            *([names[each.bundle]] if names else []),
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


def pareto_plot(found: Sequence[Measurement], budget: Budget, chosen: Measurement, names: Mapping[Path, str]) -> str:
    """Quality over the part of the reference's time, as SVG, the chosen way in the other colour.

    What is beyond the axis lies on its end: the axis begins at 0 and shows up to some times the limit of a change, and
    up to 60 dB of PSNR.

    Args:
        found: the ways.
        budget: is the straight line.
        chosen: one of them.
        names: of bundles, in the order of their shapes and of the legend; empty if there is one.
    """
    shapes = {bundle: index for index, bundle in enumerate(names)}
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
        side, radius = ("second", 4.5) if each.drawing == chosen.drawing else ("first", 2.6)
        whose = f"{names[each.bundle]}, " if names else ""
        told = f"{whose}{each.way}: {budget.text(each.quality)}, {1 / each.ratio:.2f} times as fast"
        return f'<g class="{side}">{_mark(shapes.get(each.bundle, 0), left, top, radius, told)}</g>'

    front = " ".join(f"{left:.1f},{top:.1f}" for left, top in map(place, pareto_front(found, budget)))
    limit = axis.y(budget.limit)
    marks = "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>' for tick in times
    )
    title, height = escape(quality_title(budget)), HEIGHT + _LEGEND_LINE * len(names)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title} over time">'
        f'{grid(axis, ticks)}<text x="{LEFT}" y="12">{title}</text>'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{limit:.1f}" y2="{limit:.1f}"/>'
        f'<g class="first"><polyline points="{front}"/></g>{"".join(map(dot, found))}{marks}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"part of the reference's time</text>{_legend(list(names.values()))}</svg>"
    )


def _legend(names: Sequence[str]) -> str:
    """A line for each bundle, below the plot."""
    return "".join(
        f'<g class="first">{_mark(shape, LEFT, HEIGHT + _LEGEND_LINE * shape + 6, 4, name)}</g>'
        f'<text x="{LEFT + 12}" y="{HEIGHT + _LEGEND_LINE * shape + 10}">{escape(name)}</text>'
        for shape, name in enumerate(names)
    )


def _mark(shape: int, left: float, top: float, radius: float, told: str) -> str:
    """A circle for shape 0, then a triangle, a square and so on, of about its area; says `told` when pointed at."""
    title = f"<title>{escape(told)}</title>"
    if shape == 0:
        return f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{radius}">{title}</circle>'
    corners = shape + 2
    turn = 2 * math.pi / corners
    reach = radius * math.sqrt(turn / math.sin(turn))
    points = " ".join(
        f"{left + reach * math.sin(index * turn):.1f},{top - reach * math.cos(index * turn):.1f}"
        for index in range(corners)
    )
    return f'<polygon points="{points}">{title}</polygon>'
