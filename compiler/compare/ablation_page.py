"""An ablation as an HTML page that stands alone."""

from __future__ import annotations

from html import escape

from sdc.compiler.compare.ablation import Ablation, AblationRow
from sdc.compiler.compare.html_parts import (
    EMPTY,
    Cell,
    Column,
    bytes_cell,
    count_cell,
    milliseconds_cell,
    page,
    paragraph,
    scientific_cell,
    section,
    table,
)
from sdc.compiler.compare.pass_report import changing_pass, format_beside, format_shapes, join_names
from sdc.compiler.compare.report import MEMORY_METHOD, format_ratio


def ablation_page(ablation: Ablation) -> str:
    """The whole of an ablation."""
    slowest = max((row.timing.ratio for row in ablation.rows if row.timing), default=1.0)
    columns = [Column("after", words=True), Column("nodes")]
    if ablation.not_run is None:
        columns += [Column(title) for title in ("kernels", "written", "ms", "ratio to the first row")]
        columns += [Column(title) for title in ("peak memory", "relative RMS", "PSNR, dB")]
    columns.append(Column("folded: passes that changed nothing", words=True))
    rows = [_ablation_cells(row, slowest, run=ablation.not_run is None) for row in ablation.rows]
    notes = [MEMORY_METHOD, *(f"{format_beside(row)}." for row in ablation.rows if row.beside_seconds is not None)]
    if ablation.idle:
        notes.append(f"After the last row, these change nothing: {join_names(ablation.idle)}.")
    if ablation.not_run is not None:
        notes.append(f"Nothing was run: {ablation.not_run}.")
    return page(
        "sdc compare --ablate",
        "<h1>What every pass is worth</h1>",
        f'<div class="sides"><div class="side"><b>compiled</b>{escape(ablation.subject)}<div class="faint">'
        f"{escape(format_shapes(ablation.shapes))}</div></div></div>",
        section("Pass by pass, cumulatively", table(columns, rows, name="ablation"), *(paragraph(n) for n in notes)),
    )


def _ablation_cells(row: AblationRow, slowest: float, *, run: bool) -> list[Cell | str]:
    cells: list[Cell | str] = [changing_pass(row), count_cell(row.nodes)]
    if run:
        execution, timing = row.execution, row.timing
        assert execution is not None
        assert timing is not None
        cells += [
            count_cell(execution.count),
            bytes_cell(execution.written_bytes),
            milliseconds_cell(timing.second_seconds),
            Cell(format_ratio(timing), timing.ratio, bar=timing.ratio / slowest),
            bytes_cell(row.peak_memory_bytes),
            EMPTY if row.relative_rms is None else scientific_cell(row.relative_rms),
            EMPTY if row.psnr_db is None else Cell(f"{row.psnr_db:.1f}", row.psnr_db),
        ]
    return [*cells, join_names(row.passes[:-1])]
