"""The figures as bars, in SVG that needs no style sheet."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from peers.report import TITLES, counted
from peers.sides import SIDES, Side
from peers.store import Store

ROW, LABEL, BARS, GAP, HEAD, FOOT = 18, 270, 300, 90, 44, 10
COLOURS = {"fp32": "#9aa0a6", "bf16": "#5b8dd9", "int8": "#3aa387"}
OURS = {"bf16": "#174ea6", "int8": "#0b5e43"}
COMPONENTS = ("unet", "vae_decoder", "picture")


@dataclass(frozen=True)
class Bar:
    """One side's time.

    Attributes:
        side: whose.
        seconds: median.
        low: lower quartile; likewise `high`.
    """

    side: Side
    seconds: float
    low: float
    high: float


def bars_of(store: Store, component: str, threads: int) -> list[Bar]:
    """Fastest first."""
    bars = []
    for side in SIDES:
        medians = [each.median for each in counted(store, side, component, threads)]
        if medians:
            low, middle, high = np.quantile(medians, (0.25, 0.5, 0.75))
            bars.append(Bar(side, float(middle), float(low), float(high)))
    return sorted(bars, key=lambda bar: bar.seconds)


def plot(store: Store, threads: int) -> str:
    """A panel for each component, below one another; whiskers are quartiles over rounds."""
    panels, top = [], 0
    for component in COMPONENTS:
        bars = bars_of(store, component, threads)
        if bars:
            panels.append(panel(f"{TITLES[component]}, {threads} threads: seconds", bars, top))
            top += HEAD + ROW * len(bars) + FOOT
    width = LABEL + BARS + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {max(top, 1)}" width="{width}" '
        f'height="{max(top, 1)}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}</svg>\n'
    )


def panel(title: str, bars: list[Bar], top: int) -> str:
    """The bars of one component."""
    longest = max(bar.high for bar in bars)
    parts = [f'<text x="8" y="{top + 26}" font-weight="bold" fill="#202124">{escape(title)}</text>']
    for index, bar in enumerate(bars):
        y = top + HEAD + ROW * index
        length, low, high = (BARS * value / longest for value in (bar.seconds, bar.low, bar.high))
        colour = (OURS if bar.side.ours else COLOURS)[bar.side.precision]
        weight = ' font-weight="bold"' if bar.side.ours else ""
        middle = y + ROW / 2 - 1
        parts.append(
            f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end" fill="#202124"{weight}>'
            f"{escape(bar.side.title)}</text>"
            f'<rect x="{LABEL}" y="{y + 2}" width="{length:.1f}" height="{ROW - 6}" fill="{colour}"/>'
            f'<line x1="{LABEL + low:.1f}" x2="{LABEL + high:.1f}" y1="{middle}" y2="{middle}" stroke="#202124"/>'
            f'<text x="{LABEL + high + 6:.1f}" y="{y + 12}" fill="#202124">{bar.seconds:.3g}</text>'
        )
    return "".join(parts)
