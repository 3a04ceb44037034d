"""Line plots as SVG, to stand in an HTML page: colours and fonts are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 22, 34
TICKS = 5
MOST_DECADES = 6
"""Beyond so many, only every second or third is labelled."""


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        name: in the legend.
        values: one for each step; on a logarithmic axis, what is not positive is left out.
        side: "first" or "second": its colour.
    """

    name: str
    values: Sequence[float]
    side: str


@dataclass(frozen=True)
class Axis:
    """Values from `low` at the bottom to `high` at the top."""

    low: float
    high: float
    logarithmic: bool

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))


def line_plot(series: Sequence[Series], *, logarithmic: bool, label: str) -> str:
    """Lines over steps counted from 1; each point says its value when pointed at.

    Args:
        series: lines of one length.
        logarithmic: whether the vertical axis is.
        label: what is plotted, for those who cannot see it.
    """
    count = len(series[0].values)
    values = [value for line in series for value in line.values]
    shown = [value for value in values if math.isfinite(value) and (value > 0 or not logarithmic)]
    if not shown:
        return '<p class="note">No difference at any step.</p>'
    axis, ticks = (_decades if logarithmic else even_axis)(shown)

    def x(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index / (count - 1) if count > 1 else 0.5)

    parts = [grid(axis, ticks), _steps(count, x(0), x(count - 1)), _legend(series)]
    for line in series:
        points = [
            (x(index), axis.y(value), index, value)
            for index, value in enumerate(line.values)
            if math.isfinite(value) and (value > 0 or not logarithmic)
        ]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top, _, _ in points)
        dots = "".join(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2.6"><title>{escape(line.name)}, step {index + 1}: '
            f"{value:.4g}</title></circle>"
            for left, top, index, value in points
        )
        parts.append(f'<g class="{line.side}"><polyline points="{path}"/>{dots}</g>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _decades(values: Sequence[float]) -> tuple[Axis, list[float]]:
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))
    every = math.ceil((high - low) / MOST_DECADES)
    return Axis(10.0**low, 10.0**high, True), [10.0**power for power in range(low, high + 1, every)]


def even_axis(values: Sequence[float]) -> tuple[Axis, list[float]]:
    """An axis from 0 and its ticks, in steps of 1, 2 or 5 times a power of ten."""
    highest = max(values) or 1.0
    rough = highest / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    count = math.ceil(highest / step)
    return Axis(0.0, step * count, False), [step * index for index in range(count + 1)]


def grid(axis: Axis, ticks: Sequence[float]) -> str:
    """Lines at the ticks, each with its number."""
    lines = []
    for tick in ticks:
        y = axis.y(tick)
        text = f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e+") if axis.logarithmic else f"{tick:g}"
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    return "".join(lines)


def _steps(count: int, begin: float, end: float) -> str:
    bottom = HEIGHT - BOTTOM
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, count) if count / step <= 10)
    marked = [0, *(index for index in range(every - 1, count, every) if index > 0)]
    marks = "".join(
        f'<text x="{begin + (end - begin) * (index / max(1, count - 1)):.1f}" y="{bottom + 15}" '
        f'text-anchor="middle">{index + 1}</text>'
        for index in marked
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>{marks}'
        f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'
    )


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    parts, left = [], LEFT + 4
    for line in series:
        parts.append(
            f'<g class="{line.side}"><circle cx="{left}" cy="10" r="4"/><text x="{left + 9}" y="14">'
            f"{escape(line.name)}</text></g>"
        )
        left += 30 + 7 * len(line.name)
    return "".join(parts)
