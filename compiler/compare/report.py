"""A comparison as text."""

from __future__ import annotations

from sdc.compiler.compare.comparison import Comparison, ComponentComparison, PictureComparison
from sdc.compiler.inspect.report import megabytes
from sdc.compiler.text_table import format_table


def format_comparison(comparison: Comparison) -> str:
    """Tables of graphs, outputs and times, and pictures; a time always has the difference of outputs beside it."""
    components = comparison.components
    parts = [
        f"first   {comparison.first}\nsecond  {comparison.second}",
        _graph_table(components),
        *(_operator_table(component) for component in components if _differing(component)),
    ]
    if any(component.timing for component in components):
        parts.append(_run_table(components))
    parts += [f"{each.name} was not run: {each.not_run}" for each in components if each.not_run]
    if comparison.pictures is not None:
        parts.append(_pictures(comparison.pictures))
    return "\n\n".join([*parts, *comparison.notes])


def _graph_table(components: tuple[ComponentComparison, ...]) -> str:
    return format_table(
        ["component", "nodes, first", "second", "size, first", "second", "ratio"],
        [
            [
                each.name,
                str(each.first_nodes),
                str(each.second_nodes),
                megabytes(each.first_bytes),
                megabytes(each.second_bytes),
                f"{each.second_bytes / each.first_bytes:.2f}",
            ]
            for each in components
        ],
    )


def _differing(component: ComponentComparison) -> dict[str, tuple[int, int]]:
    return {operator: counts for operator, counts in component.operators.items() if counts[0] != counts[1]}


def _operator_table(component: ComponentComparison) -> str:
    differing = sorted(_differing(component).items(), key=lambda item: (-abs(item[1][0] - item[1][1]), item[0]))
    equal = len(component.operators) - len(differing)
    table = format_table(
        [f"operators of {component.name}", "first", "second", "change"],
        [[name, str(first), str(second), f"{second - first:+d}"] for name, (first, second) in differing],
    )
    return f"{table}\n{equal} other operators occur equally often" if equal else table


def _run_table(components: tuple[ComponentComparison, ...]) -> str:
    rows = []
    for each in components:
        timing = each.timing
        for index, output in enumerate(each.outputs):
            times = ["", "", ""]
            if timing is not None and index == 0:
                times = [
                    f"{1000 * timing.first_seconds:.2f}",
                    f"{1000 * timing.second_seconds:.2f}",
                    f"{timing.ratio:.2f} ({timing.lowest_ratio:.2f} to {timing.highest_ratio:.2f})",
                ]
            rows.append(
                [
                    f"{each.name}: {output.name}",
                    f"{output.largest:.2e}",
                    f"{output.mean:.2e}",
                    f"{output.relative_rms:.2e}",
                    f"{output.scale:.3g}",
                    *times,
                ]
            )
    table = format_table(
        ["output", "largest diff.", "mean diff.", "relative RMS", "largest", "first, ms", "second, ms", "ratio"],
        rows,
    )
    rounds = next(each.timing.rounds for each in components if each.timing is not None)
    return f"{table}\nTimes: medians of {rounds} calls of each in turn; ratio second to first, with its quartiles."


def _pictures(pictures: PictureComparison) -> str:
    settings = pictures.settings
    values = ", ".join(f"{value:.1f}" for value in pictures.psnr_db)
    mean = sum(pictures.psnr_db) / len(pictures.psnr_db)
    return (
        f"pictures at equal seeds ({settings.sampler}, {settings.steps} steps, guidance {settings.guidance_scale:g}): "
        f"PSNR {mean:.2f} dB ({values})"
    )
