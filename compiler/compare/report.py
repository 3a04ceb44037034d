"""A comparison as text."""

from __future__ import annotations

from statistics import mean

from sdc.compiler.compare.comparison import Comparison, ComponentComparison, ComponentSide
from sdc.compiler.compare.denoising import Denoising
from sdc.compiler.compare.outputs import Timing
from sdc.compiler.compare.pictures import PictureComparison
from sdc.compiler.inspect.report import megabytes
from sdc.compiler.text_table import format_table

STEPS_SHOWN = 6

MEMORY_METHOD = (
    "Kernels: executed in one call, as the backend tells. Written: their results' bytes at the size compared.\n"
    "Memory: peak resident size of a process of its own that loads the engine and runs it once, Python included."
)


def format_comparison(comparison: Comparison) -> str:
    """Tables of graphs, outputs and times, and pictures; a time always has the difference of outputs beside it."""
    components = comparison.components
    parts = [
        f"first   {comparison.first}\nsecond  {comparison.second}",
        _graph_table(components),
        *(_operator_table(component) for component in components if _differing(component)),
    ]
    if any(component.first.execution for component in components):
        parts.append(_execution_table(components))
    if any(component.timing for component in components):
        parts.append(_run_table(components))
    parts += [f"{each.name} was not run: {each.not_run}" for each in components if each.not_run]
    parts += [
        f"outputs of {each.name} are not compared: {each.not_compared}" for each in components if each.not_compared
    ]
    if comparison.denoising is not None:
        parts.append(_denoising(comparison.denoising))
    if comparison.pictures is not None:
        parts.append(_pictures(comparison.pictures))
    return "\n\n".join([*parts, *comparison.notes])


def _graph_table(components: tuple[ComponentComparison, ...]) -> str:
    return format_table(
        ["component", "nodes, first", "second", "size, first", "second", "ratio"],
        [
            [
                each.name,
                str(each.first.nodes),
                str(each.second.nodes),
                megabytes(each.first.file_bytes),
                megabytes(each.second.file_bytes),
                f"{each.second.file_bytes / each.first.file_bytes:.2f}",
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


def _execution_table(components: tuple[ComponentComparison, ...]) -> str:
    names = ("kernels", "written", "largest", "memory")
    table = format_table(
        ["component", *(part for name in names for part in (f"{name}, first", "second"))],
        [
            [
                each.name,
                *(_count(side) for side in (each.first, each.second)),
                *(_execution_bytes(side, "written_bytes") for side in (each.first, each.second)),
                *(_execution_bytes(side, "largest_bytes") for side in (each.first, each.second)),
                *(_memory(side) for side in (each.first, each.second)),
            ]
            for each in components
        ],
    )
    return f"{table}\n{MEMORY_METHOD}"


def _count(side: ComponentSide) -> str:
    return "" if side.execution is None else str(side.execution.count)


def _execution_bytes(side: ComponentSide, name: str) -> str:
    value = getattr(side.execution, name, None)
    return "" if value is None else megabytes(value)


def _memory(side: ComponentSide) -> str:
    return "" if side.peak_memory_bytes is None else megabytes(side.peak_memory_bytes)


def _run_table(components: tuple[ComponentComparison, ...]) -> str:
    rows = []
    for each in components:
        times = [] if each.timing is None else _times(each.timing)
        if not each.outputs and times:
            rows.append([each.name, "", "", "", "", *times])
        for index, output in enumerate(each.outputs):
            rows.append(
                [
                    f"{each.name}: {output.name}",
                    f"{output.largest:.2e}",
                    f"{output.mean:.2e}",
                    f"{output.relative_rms:.2e}",
                    f"{output.scale:.3g}",
                    *(times if index == 0 else [""] * 3),
                ]
            )
    table = format_table(
        ["output", "largest diff.", "mean diff.", "relative RMS", "largest", "first, ms", "second, ms", "ratio"],
        rows,
    )
    rounds = next(each.timing.rounds for each in components if each.timing is not None)
    legend = f"Times: medians of {rounds} calls of each in turn; ratio second to first: the median over rounds"
    return f"{table}\n{legend}, with its quartiles."


def _times(timing: Timing) -> list[str]:
    return [f"{1000 * timing.first_seconds:.2f}", f"{1000 * timing.second_seconds:.2f}", format_ratio(timing)]


def format_ratio(timing: Timing) -> str:
    """The ratio with its quartiles."""
    return f"{timing.ratio:.2f} ({timing.lowest_ratio:.2f} to {timing.highest_ratio:.2f})"


def _denoising(denoising: Denoising) -> str:
    steps = denoising.steps
    shown = sorted({round(i * (len(steps) - 1) / (STEPS_SHOWN - 1)) for i in range(STEPS_SHOWN)})
    table = format_table(
        ["denoising step", "timestep", "epsilon", "drift", "first, ms", "second, ms"],
        [
            [
                str(index + 1),
                f"{steps[index].timestep:g}",
                f"{steps[index].epsilon:.2e}",
                f"{steps[index].drift:.2e}",
                f"{1000 * steps[index].first_seconds:.2f}",
                f"{1000 * steps[index].second_seconds:.2f}",
            ]
            for index in shown
        ],
    )
    return (
        f"{table}\n"
        "Epsilon: relative RMS of the UNets' predictions on the first side's latents. Drift: of the latents when each\n"
        f"side follows its own; {denoising.final_drift:.2e} at the end. A step of the second side takes "
        f"{format_ratio(denoising.timing)}\nof the first's."
    )


def _pictures(pictures: PictureComparison) -> str:
    settings = pictures.settings
    lines = [
        f"pictures at equal seeds ({settings.sampler}, {settings.steps} steps, guidance {settings.guidance_scale:g}):",
        f"PSNR {mean(pictures.psnr_db):.2f} dB ({', '.join(f'{value:.1f}' for value in pictures.psnr_db)})",
    ]
    if pictures.ssim is not None:
        lines.append(f"SSIM {mean(pictures.ssim):.4f} ({', '.join(f'{value:.4f}' for value in pictures.ssim)})")
    return "\n".join(lines)
