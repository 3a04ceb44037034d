"""Ablations and bisections as text."""

from __future__ import annotations

from collections.abc import Sequence

from sdc.compiler.compare.ablation import Ablation, AblationRow
from sdc.compiler.compare.bisection import Bisection
from sdc.compiler.compare.report import MEMORY_METHOD, format_ratio
from sdc.compiler.inspect.report import megabytes
from sdc.compiler.text_table import format_table

FIRST_ROW = "as exported"


def format_ablation(ablation: Ablation) -> str:
    """One row for each pass that changes the lowered graph, and the passes that do not."""
    rows = ablation.rows
    parts = [f"{ablation.subject}\n{format_shapes(ablation.shapes)}"]
    headers = ["after", "nodes"]
    cells = [[changing_pass(row), str(row.nodes)] for row in rows]
    if ablation.not_run is None:
        headers += ["kernels", "written", "ms", "ratio to the first row", "memory", "relative RMS", "PSNR, dB"]
        cells = [[*left, *_measured(row)] for left, row in zip(cells, rows, strict=True)]
    parts.append(format_table(headers, cells))
    if ablation.not_run is None and rows[0].timing is not None:
        parts[-1] += (
            "\nEach row is the graph after all passes so far, then lowered. Times: medians of "
            f"{rows[0].timing.rounds} rounds over all rows;\nratio: the median over rounds, with its quartiles. "
            f"{MEMORY_METHOD}"
        )
    parts += [format_beside(row) for row in rows if row.beside_seconds is not None]
    folded = [f"  before {changing_pass(row)}: {join_names(row.passes[:-1])}" for row in rows if len(row.passes) > 1]
    if ablation.idle:
        folded.append(f"  at the end: {join_names(ablation.idle)}")
    if folded:
        parts.append("\n".join(["passes that leave the lowered graph as it was:", *folded]))
    if ablation.not_run is not None:
        parts.append(f"nothing was run: {ablation.not_run}")
    return "\n\n".join(parts)


def changing_pass(row: AblationRow) -> str:
    """The pass that a row is for."""
    return row.passes[-1] if row.passes else FIRST_ROW


def format_beside(row: AblationRow) -> str:
    """What the engines beside the one that runs at each step take."""
    times = ", ".join(
        f"{name} {1000 * seconds:.2f} ms once a {'picture' if name == 'unet_prompt' else 'timestep'}"
        for name, seconds in (row.beside_seconds or {}).items()
    )
    return f"{changing_pass(row)}: the engine that runs at each step, alone; before it {times}"


def format_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    """Inputs with their sizes, in one line."""
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def join_names(passes: Sequence[str]) -> str:
    """Names of passes in order, the phase only where a new one begins."""
    parts: list[str] = []
    phase = ""
    for each in passes:
        before, _, name = each.partition(": ")
        parts.append(name if before == phase else each)
        phase = before
    return ", ".join(parts)


def _measured(row: AblationRow) -> list[str]:
    execution, timing, memory = row.execution, row.timing, row.peak_memory_bytes
    assert execution is not None
    assert timing is not None
    assert memory is not None
    return [
        str(execution.count),
        "" if execution.written_bytes is None else megabytes(execution.written_bytes),
        f"{1000 * timing.second_seconds:.2f}",
        format_ratio(timing),
        megabytes(memory),
        f"{row.relative_rms:.2e}",
        f"{row.psnr_db:.1f}",
    ]


def format_bisection(bisection: Bisection) -> str:
    """The error after every pass that changed it, and the first pass that breaks the tolerance."""
    shown = [
        step
        for index, step in enumerate(bisection.steps)
        if index in (0, len(bisection.steps) - 1) or step.error != bisection.steps[index - 1].error
    ]
    table = format_table(
        ["after", "nodes", "largest relative error"],
        [[step.name, str(step.nodes), "not run" if step.failure else f"{step.error:.2e}"] for step in shown],
    )
    parts = [f"{bisection.subject}\n{format_shapes(bisection.shapes)}", table]
    failure = bisection.steps[-1].failure
    if failure:
        parts.append(failure)
    passes = sum(not step.name.startswith("engine: ") for step in bisection.steps)
    if bisection.broken is None:
        parts.append(f"all of {passes} passes keep the relative error within {bisection.tolerance:g}")
    else:
        parts.append(f"broken: {bisection.broken} is the first after which it is more than {bisection.tolerance:g}")
    if bisection.not_run is not None:
        parts.append(f"the engine was not run: {bisection.not_run}")
    return "\n\n".join(parts)
