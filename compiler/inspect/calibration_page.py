"""A calibration as an HTML page: the drift of every layer's range along the denoising, and outlier channels."""

from __future__ import annotations

from html import escape

from sdc.compiler.compare.html_parts import Cell, Column, page, paragraph, section, table, tiles
from sdc.compiler.compare.svg_plot import Series, line_plot
from sdc.compiler.inspect.calibration_file import CalibrationDescription

PLOTS = 12
"""Tensors that are plotted: those whose ranges move most."""


def calibration_page(description: CalibrationDescription) -> str:
    """The whole of a description."""
    measured = description.table
    return page(
        "sdc inspect: calibration",
        f"<h1>Calibration of {escape(measured.graph_digest[:12])}</h1>",
        tiles(
            [
                ("tensors", str(len(measured.tensors)), f"{len(measured.timesteps)} timesteps"),
                ("outlier channels", str(len(description.outliers)), "above 10 times the median channel"),
                ("largest drift", f"{next(iter(description.drift.values()), 1.0):.3g}", "times the quietest timestep"),
            ]
        ),
        section(
            "Ranges that move most",
            paragraph("Smallest and largest value at each step of the denoising, from the noisiest to the last."),
            *_plots(description),
        ),
        section("Drift of every tensor", _drift_table(description)),
        section("Outlier channels", _outlier_table(description)),
        section("Timesteps that show most of the ranges", _choice_table(description)),
    )


def _plots(description: CalibrationDescription) -> list[str]:
    parts = []
    for name in list(description.drift)[:PLOTS]:
        each = description.table.tensors[name]
        lines = [Series("largest", each.maxima, "first"), Series("-smallest", [-low for low in each.minima], "second")]
        parts.append(f"<h3>{escape(name)}</h3>" + line_plot(lines, logarithmic=False, label=f"range of {name}"))
    return parts


def _drift_table(description: CalibrationDescription) -> str:
    rows: list[list[Cell | str]] = []
    for name, drift in description.drift.items():
        seen = description.table.tensors[name].seen
        rows.append([name, _number(drift, 3), _number(seen.low, 4), _number(seen.high, 4)])
    heads = [Column("tensor", words=True), Column("drift"), Column("smallest"), Column("largest")]
    return table(heads, rows, name="drift")


def _outlier_table(description: CalibrationDescription) -> str:
    rows: list[list[Cell | str]] = [
        [each.tensor, _number(each.channel, 6), _number(each.magnitude, 4), _number(each.ratio, 3)]
        for each in description.outliers
    ]
    heads = [Column("tensor", words=True), Column("channel"), Column("magnitude"), Column("times the median")]
    return table(heads, rows, name="outliers") if rows else ""


def _choice_table(description: CalibrationDescription) -> str:
    rows: list[list[Cell | str]] = [
        [
            ", ".join(f"{each:g}" for each in choice.timesteps),
            Cell(f"{choice.covered:.1%}", choice.covered),
            Cell(f"{choice.covered_evenly:.1%}", choice.covered_evenly),
        ]
        for choice in description.choices
    ]
    heads = [Column("timesteps", words=True), Column("covered"), Column("evenly spread")]
    return table(heads, rows, name="choices") if rows else ""


def _number(value: float, digits: int) -> Cell:
    return Cell(f"{value:.{digits}g}", value)
