"""What drawing pictures takes: every engine by itself, and the pipeline as it loads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdc.compiler.memory.engine_plan import EnginePlan, EnginePlanner, Request
from sdc.compiler.memory.openvino_engines import PROCESS_BYTES
from sdc.compiler.memory.shard_arrays import arrays_beside
from sdc.compiler.memory.stages import Stage, plan_stages
from sdc.engines.bundle import Bundle
from sdc.engines.errors import BundleError, InputError
from sdc.engines.generation import check_measures, check_pictures
from sdc.engines.load_ahead import loads_unet_ahead
from sdc.engines.pipeline import NEEDED
from sdc.engines.specs import SHALLOW
from sdc.engines.targets import OPENVINO
from sdc.engines.wiring import depends_on_timestep_only, hoisted_parts


@dataclass(frozen=True)
class PicturePlan:
    """The memory of a target's engines for a request.

    Attributes:
        target: its name.
        request: what is drawn.
        engines: all of the target's, by component.
        stages: in the order in which they run; engines stay loaded, unless a figure says otherwise.
        loads_ahead: whether the UNet is loaded while the text encoder runs.
        process_bytes: of the interpreter and libraries; None where that is not known, and comes on top.
    """

    target: str
    request: Request
    engines: Mapping[str, EnginePlan]
    stages: tuple[Stage, ...]
    loads_ahead: bool
    process_bytes: int | None

    @property
    def peak(self) -> Stage:
        """The stage that takes most."""
        return max(self.stages, key=lambda stage: stage.total_bytes)

    @property
    def one_arena_bytes(self) -> int:
        """The peak, if all engines shared one arena."""
        return max(stage.one_arena_bytes for stage in self.stages)

    @property
    def released_bytes(self) -> int:
        """The peak, if engines are released as soon as a picture does not need them any more."""
        return max(stage.released_bytes for stage in self.stages)

    @property
    def run_bytes(self) -> int:
        """What `sdc run` takes as a process, where that is known; with ``--no-prefetch`` if the request is without."""
        return self.released_bytes + (self.process_bytes or 0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": self.target,
            "height_px": self.request.height_px,
            "width_px": self.request.width_px,
            "pictures": self.request.pictures,
            "guidance_scale": self.request.guidance_scale,
            "deepcache": self.request.deepcache,
            "measures": self.request.measures.to_json(),
            "engines": {name: engine.to_json() for name, engine in self.engines.items()},
            "stages": [stage.to_json() for stage in self.stages],
            "loads_ahead": self.loads_ahead,
            "peak_bytes": self.peak.total_bytes,
            "peak_stage": self.peak.component,
            "one_arena_bytes": self.one_arena_bytes,
            "released_bytes": self.released_bytes,
            "process_bytes": self.process_bytes,
        }


def plan_pictures(bundle: Bundle, target: str, request: Request) -> PicturePlan:
    """Plan the memory of one target; nothing is loaded, and the target need not run here.

    Raises:
        BundleError: the bundle lacks a component, or says too little of an engine.
        InputError: the request is outside of what the bundle takes.
        TargetError: the bundle has no such target.
    """
    check_request(bundle, request)
    return plan_with(EnginePlanner(bundle, target), target, request)


def plan_with(planner: EnginePlanner, target: str, request: Request) -> PicturePlan:
    """The plan of a request that was checked."""
    engines = {component: planner.plan(component, request) for component in planner.graphs}
    running = {name: engine for name, engine in engines.items() if request.deepcache or name != SHALLOW}
    backend = planner.entry.backend
    process_bytes = PROCESS_BYTES if backend == OPENVINO else None
    shards = arrays_beside(planner.bundle, engines, request)
    loads_ahead = loads_unet_ahead(backend, prefetch=request.prefetch) and not shards
    passing = [
        part.name for part in hoisted_parts(planner.bundle.manifest.components) if depends_on_timestep_only(part)
    ]
    stages = plan_stages(running, backend, request, passing=passing, shards=shards)
    return PicturePlan(target, request, engines, stages, loads_ahead, process_bytes)


def check_request(bundle: Bundle, request: Request) -> None:
    """Check a request against what a bundle takes.

    Raises:
        BundleError: the bundle lacks a component.
        InputError: the request is outside of what the bundle takes.
    """
    manifest = bundle.manifest
    missing = [component for component in NEEDED if component not in manifest.components]
    if missing:
        raise BundleError(f"the bundle {bundle.path} has no {', '.join(missing)}", hint="export the whole model")
    if request.deepcache and SHALLOW not in manifest.components:
        raise InputError(f"the bundle {bundle.path} has no shallow UNet", hint="export it with --deepcache")
    check_pictures(
        request.pictures,
        guidance_scale=request.guidance_scale,
        height_px=request.height_px,
        width_px=request.width_px,
        settings=manifest.pipeline,
        specs=manifest.components,
    )
    check_measures(request.measures, manifest.pipeline, manifest.components)
