"""Memory plans as an HTML page: the tables, and every engine's lifetimes as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sdc.compiler.compare.html_parts import Cell, Column, bytes_cell, page, paragraph, section, table, tiles
from sdc.compiler.inspect.report import megabytes
from sdc.compiler.memory.lifetime_plot import lifetime_plot
from sdc.compiler.memory.picture_plan import PicturePlan
from sdc.compiler.memory.report import ENGINE_HEADS, STAGE_HEADS, stage_figures


def plan_page(title: str, plans: Sequence[PicturePlan]) -> str:
    """The whole page.

    Args:
        title: names the bundle.
        plans: one for each target, all of one request.
    """
    request = plans[0].request
    what = f"{request.pictures} x {request.width_px}x{request.height_px} px, guidance {request.guidance_scale:g}"
    return page(
        "sdc plan",
        f"<h1>Memory of {escape(title)}</h1>",
        paragraph(f"{what}. Predicted; the interpreter and the backend's library come on top."),
        *(part for plan in plans for part in _of_target(plan)),
    )


def _of_target(plan: PicturePlan) -> list[str]:
    meanwhile = ", the UNet loaded while the text encoder runs" if plan.loads_ahead else ""
    figures = [
        ("peak", megabytes(plan.peak.total_bytes), f"in {plan.peak.component}"),
        ("one arena for all engines", megabytes(plan.one_arena_bytes), "peak, if they shared it"),
        ("as sdc run", megabytes(plan.released_bytes), f"peak, with engines released in time{meanwhile}"),
    ]
    pictures = "".join(
        f"<figure><h3>{escape(name)}</h3>"
        f"{lifetime_plot(engine.memory.written, label=f'lifetimes of the buffers of {name}')}</figure>"
        for name, engine in plan.engines.items()
    )
    return [
        section(f"Target {plan.target}", tiles(figures), _engine_table(plan), _stage_table(plan)),
        section(
            f"Lifetimes, {plan.target}",
            paragraph("Each rectangle is a buffer at its place in the arena; the line is what lives at each step."),
            f'<div class="plots">{pictures}</div>',
        ),
    ]


def _engine_table(plan: PicturePlan) -> str:
    rows: list[list[Cell | str]] = [
        [
            name,
            " ".join(f"{symbol}={size}" for symbol, size in engine.sizes.items()),
            bytes_cell(engine.weight_bytes),
            bytes_cell(engine.held.weight_bytes),
            bytes_cell(engine.memory.input_bytes),
            bytes_cell(engine.memory.naive_bytes),
            bytes_cell(engine.memory.written.arena.bytes),
            bytes_cell(engine.memory.written.lower_bound_bytes),
            bytes_cell(engine.memory.reordered.arena.bytes),
        ]
        for name, engine in plan.engines.items()
    ]
    return table([Column(head, words=head == "sizes") for head in ENGINE_HEADS], rows, name=f"engines-{plan.target}")


def _stage_table(plan: PicturePlan) -> str:
    rows: list[list[Cell | str]] = [
        [stage.component, ", ".join(stage.loaded), *map(bytes_cell, stage_figures(stage))] for stage in plan.stages
    ]
    return table([Column(head, words=head == "loaded") for head in STAGE_HEADS], rows, name=f"stages-{plan.target}")
