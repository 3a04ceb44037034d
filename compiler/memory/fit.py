"""The smallest measures with which pictures fit into a limit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from sdc.compiler.byte_sizes import gibibytes
from sdc.compiler.memory.engine_plan import EnginePlanner, Request
from sdc.compiler.memory.limit import Fit
from sdc.compiler.memory.picture_plan import PicturePlan, check_request, plan_with
from sdc.engines.bundle import Bundle
from sdc.engines.errors import InputError
from sdc.engines.generation import allowed_sizes, largest_batch
from sdc.engines.measures import Measures
from sdc.engines.targets import OPENVINO

RESERVE = 0.02
"""Part of a limit that stays free. Source: docs/results/memory.md, what whole processes take beside the prediction."""

_PREDICTED = frozenset({"fp32", "fp16", "bf16", "int8"})
"""Precisions whose memory is known. Some kernels expand weights of w8 and w4, which "mixed" may have."""


def fit_pictures(bundle: Bundle, target: str, request: Request, limit_bytes: int) -> tuple[Fit, PicturePlan]:
    """The least that has to be done for `sdc run` to stay below a limit, and the plan with it.

    No engine is loaded while another runs. Each stage takes the first of its measures with which it fits, after none:

    1. UNet: fewer pictures at a time, a number that divides them all.
    2. VAE decoder: one picture at a time; then the largest tile that fits: strips across the whole picture, the tallest
       first, since a strip has fewer edges than a square of its area; then pieces of the lowest strip.

    Args:
        bundle: what the pictures are drawn with.
        target: of the bundle.
        request: what is drawn; its own measures do not count, nor what it says of loading engines while others run.
        limit_bytes: of the whole process.

    Raises:
        BundleError: as for `plan_pictures`; likewise TargetError.
        InputError: nothing fits, or the request is outside of what the bundle takes, or the target is one whose memory
            is not predicted closely enough for a limit.
    """
    check_request(bundle, request)
    if not keeps_limits(bundle, target):
        raise InputError(
            f"what the target {target!r} takes in {bundle.manifest.precision} is not predicted closely enough to keep "
            "a limit",
            hint="use the target cpu, in int8 or a floating-point precision throughout",
        )
    request = replace(request, measures=Measures(), prefetch=False)
    usable_bytes = int(limit_bytes * (1 - RESERVE))
    planner = EnginePlanner(bundle, target)
    plan = plan_with(planner, target, request)
    needed: dict[str, int] = {}
    for component in [stage.component for stage in plan.stages]:
        options = _options(component, bundle, plan.request)
        plans = [plan]
        for measures in options:
            plans.append(plan_with(planner, target, replace(request, measures=measures)))
            if stage_bytes(plans[-1], component) <= usable_bytes:
                plan = plans[-1]
                break
        else:
            needed[component] = math.ceil(min(stage_bytes(each, component) for each in plans) / (1 - RESERVE))
    if needed:
        component = max(needed, key=lambda each: needed[each])
        raise InputError(
            f"{gibibytes(limit_bytes)} are too little for {request.pictures} x {request.width_px}x{request.height_px} "
            f"px: {component} needs {gibibytes(needed[component])}, whatever is done",
            hint="raise the limit, draw smaller pictures or use a bundle of lower precision",
        )
    return Fit(limit_bytes, plan.run_bytes, plan.request.measures), plan


def keeps_limits(bundle: Bundle, target: str) -> bool:
    """Whether the memory of a target is predicted closely enough.

    Raises:
        TargetError: the bundle has no such target.
    """
    return bundle.target(target).backend == OPENVINO and bundle.manifest.precision in _PREDICTED


def stage_bytes(plan: PicturePlan, component: str) -> int:
    """What the process takes while an engine runs, if those before it were released."""
    stage = next(stage for stage in plan.stages if stage.component == component)
    return stage.released_bytes + (plan.process_bytes or 0)


def _options(component: str, bundle: Bundle, request: Request) -> Iterator[Measures]:
    """What can be done for a stage beside what was chosen for those before it, from nothing to the most."""
    chosen, count = request.measures, request.pictures
    if component == "vae_decoder":
        # Where the last run would be one of fewer pictures, the engine would be compiled twice.
        if count % min(count, largest_batch(bundle.manifest.components[component])) == 0:
            yield chosen
        if count > 1:
            yield replace(chosen, decoded_at_once=1)
        for tile in tile_sizes(bundle, request):
            yield replace(chosen, decoded_at_once=1 if count > 1 else None, tile_px=tile)
        return
    yield chosen
    if component != "text_encoder":
        for fewer in range((chosen.pictures_at_once or count) - 1, 0, -1):
            if count % fewer == 0:
                yield replace(chosen, pictures_at_once=fewer)


def tile_sizes(bundle: Bundle, request: Request) -> Iterator[tuple[int, int]]:
    """Heights and widths of tiles in pixels, in the order in which they are tried."""
    spec, scale = bundle.manifest.components["vae_decoder"], bundle.manifest.pipeline.vae_reduction

    def smaller(axis: int, size_px: int) -> list[int]:
        allowed = allowed_sizes(spec, "latent_sample", axis)
        step = scale * allowed.multiple
        return list(range((size_px - 1) // step * step, scale * allowed.minimum - 1, -step))

    heights = smaller(2, request.height_px)
    yield from ((height, request.width_px) for height in heights)
    lowest = min(heights, default=request.height_px)
    yield from ((lowest, width) for width in smaller(3, request.width_px))
