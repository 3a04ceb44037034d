"""A comparison as an HTML page that stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from statistics import mean

from sdc.compiler.compare.comparison import Comparison, ComponentComparison, ComponentSide
from sdc.compiler.compare.denoising import Denoising
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
    tiles,
)
from sdc.compiler.compare.picture_pairs import picture_pairs
from sdc.compiler.compare.report import MEMORY_METHOD, format_ratio
from sdc.compiler.compare.svg_plot import Series, line_plot

FIRST, SECOND = Column("first", "first"), Column("second", "second")


def comparison_page(comparison: Comparison) -> str:
    """The whole of a comparison."""
    components = comparison.components
    return page(
        "sdc compare",
        "<h1>Two sides, compared</h1>",
        f'<div class="sides"><div class="side"><b>first</b>{escape(comparison.first)}</div>'
        f'<div class="side second"><b>second</b>{escape(comparison.second)}</div></div>',
        tiles(_highlights(comparison)),
        section("Graphs and kernels", _graph_table(components)),
        section("Memory and time", _cost_table(components), paragraph(MEMORY_METHOD)),
        section("Outputs on equal inputs", _output_table(components), *_reasons(components)),
        _denoising_section(comparison.denoising),
        _picture_section(comparison),
        section("Operators and kernels", *(_kind_tables(component) for component in components)),
        section("Notes", *(paragraph(note) for note in comparison.notes)),
    )


def _highlights(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The few figures that most readers came for."""
    figures = []
    component = next((each for each in comparison.components if each.name == "unet"), comparison.components[0])
    nodes = component.first.nodes, component.second.nodes
    figures.append((f"nodes of {component.name}", _change(*nodes), f"{nodes[0]:,} to {nodes[1]:,}"))
    left, right = component.first.execution, component.second.execution
    if left is not None and right is not None:
        counts = left.count, right.count
        figures.append((f"kernels of {component.name}", _change(*counts), f"{counts[0]:,} to {counts[1]:,}"))
    timing = comparison.denoising.timing if comparison.denoising else component.timing
    if timing is not None:
        spread = f"of the first's; {timing.lowest_ratio:.2f} to {timing.highest_ratio:.2f}"
        figures.append(("time of a step", f"{timing.ratio:.2f}", spread))
    if comparison.denoising is not None:
        worst = max(step.epsilon for step in comparison.denoising.steps)
        figures.append(("error of epsilon", f"{worst:.1e}", "relative RMS, the worst step"))
    if comparison.pictures is not None:
        psnr = comparison.pictures.psnr_db
        figures.append(("PSNR of pictures", f"{mean(psnr):.1f} dB", f"mean of {len(psnr)}; worst {min(psnr):.1f} dB"))
    if comparison.pictures is not None and comparison.pictures.ssim is not None:
        ssim = comparison.pictures.ssim
        figures.append(("SSIM of pictures", f"{mean(ssim):.4f}", f"worst {min(ssim):.4f}"))
    return figures


def _change(first: float, second: float) -> str:
    return "equal" if first == second else f"{100 * (second - first) / first:+.1f} %".replace("-", "−")


def _graph_table(components: tuple[ComponentComparison, ...]) -> str:
    columns = [Column("component", words=True)]
    for name in ("nodes", "kernels", "files"):
        columns += [Column(f"{name}, first", "first"), Column("second", "second"), Column("change")]
    rows: list[list[Cell | str]] = []
    for each in components:
        pairs = zip(_graph_figures(each.first), _graph_figures(each.second), strict=True)
        rows.append([each.name, *(cell for one, other in pairs for cell in _changed(one, other))])
    return table(columns, rows, name="graphs")


def _graph_figures(side: ComponentSide) -> list[Cell]:
    execution = side.execution
    return [
        count_cell(side.nodes),
        count_cell(None if execution is None else execution.count),
        bytes_cell(side.file_bytes),
    ]


def _changed(one: Cell, other: Cell) -> list[Cell]:
    if one.value is None or other.value is None or not one.value:
        return [one, other, EMPTY]
    change = (other.value - one.value) / one.value
    return [one, other, Cell(_change(one.value, other.value), change)]


def _cost_table(components: tuple[ComponentComparison, ...]) -> str:
    columns = [Column("component", words=True)]
    for name in ("written", "largest", "peak memory", "ms"):
        columns += [Column(f"{name}, first", "first"), Column("second", "second")]
    columns.append(Column("time, second to first"))
    rows: list[list[Cell | str]] = []
    for each in components:
        pairs = zip(_cost_figures(each.first), _cost_figures(each.second), strict=True)
        timing = each.timing
        times = [EMPTY] * 3
        if timing is not None:
            times = [milliseconds_cell(timing.first_seconds), milliseconds_cell(timing.second_seconds)]
            times.append(Cell(format_ratio(timing), timing.ratio))
        rows.append([each.name, *(cell for pair in pairs for cell in pair), *times])
    return table(columns, rows, name="costs")


def _cost_figures(side: ComponentSide) -> list[Cell]:
    execution = side.execution
    return [
        bytes_cell(None if execution is None else execution.written_bytes),
        bytes_cell(None if execution is None else execution.largest_bytes),
        bytes_cell(side.peak_memory_bytes),
    ]


def _output_table(components: tuple[ComponentComparison, ...]) -> str:
    columns = [Column("output", words=True), Column("shape", words=True)]
    columns += [
        Column("largest difference"),
        Column("mean difference"),
        Column("relative RMS"),
        Column("largest value"),
    ]
    rows: list[list[Cell | str]] = [
        [
            f"{each.name}: {output.name}",
            "×".join(map(str, output.shape)),
            scientific_cell(output.largest),
            scientific_cell(output.mean),
            scientific_cell(output.relative_rms),
            Cell(f"{output.scale:.3g}", output.scale),
        ]
        for each in components
        for output in each.outputs
    ]
    return table(columns, rows, name="outputs") if rows else ""


def _reasons(components: tuple[ComponentComparison, ...]) -> list[str]:
    return [
        paragraph(f"{each.name}: {reason}")
        for each in components
        for reason in (each.not_run, each.not_compared)
        if reason
    ]


def _denoising_section(denoising: Denoising | None) -> str:
    if denoising is None:
        return ""
    steps = denoising.steps
    drift = [*(step.drift for step in steps[1:]), denoising.final_drift]
    times = [
        Series("first", [1000 * step.first_seconds for step in steps], "first"),
        Series("second", [1000 * step.second_seconds for step in steps], "second"),
    ]
    plots = [
        _plot(
            "Error of epsilon",
            "relative RMS of the second UNet's prediction, both on the first side's latents",
            line_plot(
                [Series("epsilon", [step.epsilon for step in steps], "second")], logarithmic=True, label="epsilon"
            ),
        ),
        _plot(
            "Drift of the latents",
            "relative RMS after the step, each side following its own predictions",
            line_plot([Series("drift", drift, "second")], logarithmic=True, label="drift"),
        ),
        _plot(
            "Time of a step, ms",
            "medians over batches, the two called in turn",
            line_plot(times, logarithmic=False, label="time of a step"),
        ),
    ]
    columns = [Column("step"), Column("timestep"), Column("epsilon"), Column("drift before it")]
    columns += [Column("ms, first", "first"), Column("second", "second")]
    rows = [
        [
            Cell(str(index + 1), index + 1),
            Cell(f"{step.timestep:g}", step.timestep),
            scientific_cell(step.epsilon),
            scientific_cell(step.drift),
            milliseconds_cell(step.first_seconds),
            milliseconds_cell(step.second_seconds),
        ]
        for index, step in enumerate(steps)
    ]
    figures = table(columns, rows, name="steps")
    return section(
        "Denoising, step by step",
        f'<div class="plots">{"".join(plots)}</div>',
        f"<details><summary>all steps as a table</summary>{figures}</details>",
    )


def _plot(title: str, caption: str, drawing: str) -> str:
    return f"<figure><h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def _picture_section(comparison: Comparison) -> str:
    if comparison.pictures is None or comparison.pairs is None:
        return ""
    settings = comparison.pictures.settings
    how = f"Equal prompts and seeds; {settings.sampler}, {settings.steps} steps, guidance {settings.guidance_scale:g}. "
    how += "The map shows the largest difference of the three channels, amplified alike in all pairs."
    return section("Pictures", paragraph(how), picture_pairs(comparison.pairs, comparison.pictures))


def _kind_tables(component: ComponentComparison) -> str:
    nodes = _kinds("operator", component.operators, f"operators-{component.name}")
    parts = [f"<summary>{escape(component.name)}</summary>", nodes]
    left, right = component.first.execution, component.second.execution
    if left is not None and right is not None:
        kinds = sorted({*left.kernels, *right.kernels})
        counts = {kind: (left.kernels.get(kind, 0), right.kernels.get(kind, 0)) for kind in kinds}
        parts.append("<p></p>" + _kinds("executed kernel", counts, f"kernels-{component.name}"))
    return f"<details>{''.join(parts)}</details>"


def _kinds(title: str, counts: Mapping[str, tuple[int, int]], name: str) -> str:
    rows: list[list[Cell | str]] = [
        [
            kind,
            count_cell(first),
            count_cell(second),
            Cell(f"{second - first:+d}" if second != first else "", second - first),
        ]
        for kind, (first, second) in sorted(counts.items(), key=lambda item: (-max(item[1]), item[0]))
    ]
    return table([Column(title, words=True), FIRST, SECOND, Column("change")], rows, name=name)
