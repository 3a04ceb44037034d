"""The lifetimes of an arena's buffers as a picture: steps from left to right, places from bottom to top."""

from __future__ import annotations

from html import escape

from sdc.compiler.compare.svg_plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, even_axis, grid
from sdc.compiler.inspect.report import megabytes
from sdc.passes.memory.lifetimes import live_bytes
from sdc.passes.memory.plan import Arrangement

_SMALLEST = 1 / 1000
"""Part of the arena below which a buffer is not drawn: it would be thinner than a hair."""


def lifetime_plot(arrangement: Arrangement, *, label: str) -> str:
    """A rectangle for each buffer, which says what it is when pointed at, and a line: what lives at each step.

    Args:
        arrangement: of one engine.
        label: what is drawn, for those who cannot see it.
    """
    steps, arena = len(arrangement.steps), arrangement.arena
    axis, ticks = even_axis([arena.bytes / 1e6])

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, steps)

    rectangles = []
    for life, offset in zip(arrangement.lifetimes, arena.offsets, strict=True):
        if life.bytes < _SMALLEST * arena.bytes:
            continue
        top, bottom = axis.y((offset + life.bytes) / 1e6), axis.y(offset / 1e6)
        rectangles.append(
            f'<rect x="{x(life.begin):.2f}" y="{top:.2f}" width="{x(life.end + 1) - x(life.begin):.2f}" '
            f'height="{bottom - top:.2f}"><title>{escape(life.name)}, {megabytes(life.bytes)}, '
            f"steps {life.begin + 1} to {life.end + 1}</title></rect>"
        )
    alive = live_bytes(arrangement.lifetimes, steps) / 1e6
    points = " ".join(
        f"{x(step + side):.2f},{axis.y(value):.2f}" for step, value in enumerate(alive) for side in (0, 1)
    )
    bottom = HEIGHT - BOTTOM
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{grid(axis, ticks)}'
        f'<text x="{LEFT - 8}" y="{TOP - 8}" text-anchor="end">MB</text>'
        f'<g class="first">{"".join(rectangles)}</g><g class="second"><polyline points="{points}"/></g>'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        f'<text x="{LEFT}" y="{bottom + 15}">1</text>'
        f'<text x="{WIDTH - RIGHT}" y="{bottom + 15}" text-anchor="end">{steps}</text>'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text></svg>'
    )
