"""Memory plans as text."""

from __future__ import annotations

from sdc.compiler.inspect.report import megabytes
from sdc.compiler.memory.engine_plan import EnginePlan
from sdc.compiler.memory.picture_plan import PicturePlan
from sdc.compiler.memory.stages import Stage
from sdc.compiler.text_table import format_table

ENGINE_HEADS = ("engine", "sizes", "weights", "held", "inputs", "naive", "shared", "lower bound", "reordered")
STAGE_HEADS = ("while it runs", "loaded", "weights", "graphs", "activations", "inputs", "pictures", "all", "released")


def format_plan(plan: PicturePlan) -> str:
    """Tables of the engines and the stages, and the peak."""
    request = plan.request
    pictures = f"{request.pictures} picture{'s' if request.pictures > 1 else ''}"
    return "\n".join(
        [
            f"target {plan.target}: {pictures} of {request.width_px}x{request.height_px} px, "
            f"guidance {request.guidance_scale:g}{', DeepCache' if request.deepcache else ''}",
            format_table(ENGINE_HEADS, [engine_row(each) for each in plan.engines.values()], words=["sizes"]),
            "",
            format_table(STAGE_HEADS, [stage_row(each) for each in plan.stages], words=["loaded"]),
            f"peak {megabytes(plan.peak.total_bytes)}, in {plan.peak.component}, if engines stay loaded; "
            f"with one arena for all that stay {megabytes(plan.one_arena_bytes)}",
            _run_line(plan),
        ]
    )


def _run_line(plan: PicturePlan) -> str:
    """What `sdc run` takes, which releases engines, and how it loads them."""
    command = "`sdc run`" if plan.request.prefetch else "`sdc run --no-prefetch`, and below a limit,"
    meanwhile = ", and loads the UNet while the text encoder runs" if plan.loads_ahead else ""
    releases = f"{command} releases engines in time{meanwhile}: {megabytes(plan.released_bytes)}"
    if plan.process_bytes is None:
        return releases
    return f"{releases}, and {megabytes(plan.process_bytes)} the process: {megabytes(plan.run_bytes)} in all"


def engine_row(engine: EnginePlan) -> list[str]:
    """The cells of one engine."""
    memory = engine.memory
    figures = (
        engine.weight_bytes,
        engine.held.weight_bytes,
        memory.input_bytes,
        memory.naive_bytes,
        memory.written.arena.bytes,
        memory.written.lower_bound_bytes,
        memory.reordered.arena.bytes,
    )
    sizes = " ".join(f"{name}={size}" for name, size in engine.sizes.items() if not name.endswith("_px"))
    return [engine.component, sizes, *map(megabytes, figures)]


def stage_row(stage: Stage) -> list[str]:
    """The cells of one stage."""
    return [stage.component, ", ".join(stage.loaded), *map(megabytes, stage_figures(stage))]


def stage_figures(stage: Stage) -> tuple[int, ...]:
    """Bytes, in the order of the heads."""
    return (
        stage.weight_bytes,
        stage.graph_bytes,
        stage.activation_bytes,
        stage.input_bytes,
        stage.picture_bytes,
        stage.total_bytes,
        stage.released_bytes,
    )
