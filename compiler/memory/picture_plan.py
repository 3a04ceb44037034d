"""What drawing pictures takes: every engine by itself, and the pipeline as it loads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from sdc.compiler.memory.engine_graphs import engine_graphs, floating_bits
from sdc.engines.bundle import Bundle
from sdc.engines.errors import BundleError, InputError
from sdc.engines.generation import check_pictures, largest_batch, takes_two_batches
from sdc.engines.pipeline import NEEDED
from sdc.engines.specs import HOISTED, SHALLOW, ComponentSpec
from sdc.engines.targets import TENSORRT_RTX
from sdc.engines.wiring import shards_of
from sdc.passes.memory.plan import MemoryPlan, plan_memory

_UNETS = ("unet", SHALLOW)
"""Engines that run in turn; `Networks` opens their sessions before those of `HOISTED`, though they run later."""

_STAGES = ("text_encoder", *HOISTED, *_UNETS, "vae_decoder")
"""Engines in the order in which `Pipeline` runs them."""


@dataclass(frozen=True)
class Request:
    """Pictures of one call.

    Attributes:
        height_px: of each; likewise ``width_px``.
        pictures: of one prompt, drawn at once.
        guidance_scale: above 1 the UNet gets two rows a picture, unless it takes the guidance as an input.
        deepcache: whether a shallow UNet runs in turn with the whole one.
    """

    height_px: int
    width_px: int
    pictures: int
    guidance_scale: float
    deepcache: bool = False


@dataclass(frozen=True)
class EnginePlan:
    """One engine.

    Attributes:
        component: its name.
        sizes: of its free dimensions.
        weight_bytes: as they are stored.
        memory: of its activations.
    """

    component: str
    sizes: Mapping[str, int]
    weight_bytes: int
    memory: MemoryPlan


@dataclass(frozen=True)
class Stage:
    """What is in memory while one engine runs.

    Attributes:
        component: the engine.
        loaded: engines that are in memory.
        weight_bytes: theirs.
        activation_bytes: of the engine that runs, and what those before it keep.
        largest_activation_bytes: of one engine: what all would need that share an arena.
        input_bytes: of the engine that runs; they are the caller's.
        released_bytes: all of it, if engines are released as soon as a picture does not need them any more.
    """

    component: str
    loaded: tuple[str, ...]
    weight_bytes: int
    activation_bytes: int
    largest_activation_bytes: int
    input_bytes: int
    released_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.activation_bytes + self.input_bytes

    @property
    def one_arena_bytes(self) -> int:
        """All of it, if the engines shared one arena."""
        return self.weight_bytes + self.largest_activation_bytes + self.input_bytes


@dataclass(frozen=True)
class PicturePlan:
    """The memory of a target's engines for a request; the interpreter and the backend's library come on top.

    Attributes:
        target: its name.
        request: what is drawn.
        engines: all of the target's, by component.
        stages: in the order in which they run; engines stay loaded, unless a figure says otherwise.
    """

    target: str
    request: Request
    engines: Mapping[str, EnginePlan]
    stages: tuple[Stage, ...]

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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "target": self.target,
            "height_px": self.request.height_px,
            "width_px": self.request.width_px,
            "pictures": self.request.pictures,
            "guidance_scale": self.request.guidance_scale,
            "deepcache": self.request.deepcache,
            "engines": {name: _engine_json(engine) for name, engine in self.engines.items()},
            "stages": [
                {
                    "component": stage.component,
                    "loaded": list(stage.loaded),
                    "weight_bytes": stage.weight_bytes,
                    "activation_bytes": stage.activation_bytes,
                    "input_bytes": stage.input_bytes,
                    "total_bytes": stage.total_bytes,
                    "released_bytes": stage.released_bytes,
                }
                for stage in self.stages
            ],
            "peak_bytes": self.peak.total_bytes,
            "peak_stage": self.peak.component,
            "one_arena_bytes": self.one_arena_bytes,
            "released_bytes": self.released_bytes,
        }


def _engine_json(engine: EnginePlan) -> dict[str, Any]:
    memory = engine.memory
    return {
        "sizes": dict(engine.sizes),
        "weight_bytes": engine.weight_bytes,
        "input_bytes": memory.input_bytes,
        "naive_bytes": memory.naive_bytes,
        "shared_bytes": memory.written.arena.bytes,
        "lower_bound_bytes": memory.written.lower_bound_bytes,
        "reordered_bytes": memory.reordered.arena.bytes,
        "reordered_lower_bound_bytes": memory.reordered.lower_bound_bytes,
        "arena": [
            {"name": life.name, "bytes": life.bytes, "begin": life.begin, "end": life.end, "offset": offset}
            for life, offset in zip(memory.written.lifetimes, memory.written.arena.offsets, strict=True)
        ],
    }


def plan_pictures(bundle: Bundle, target: str, request: Request) -> PicturePlan:
    """Plan the memory of one target; nothing is loaded, and the target need not run here.

    Raises:
        BundleError: the bundle lacks a component, or says too little of an engine.
        InputError: the request is outside of what the bundle takes, or its UNet is in shards.
        TargetError: the bundle has no such target.
    """
    manifest = bundle.manifest
    missing = [component for component in NEEDED if component not in manifest.components]
    if missing:
        raise BundleError(f"the bundle {bundle.path} has no {', '.join(missing)}", hint="export the whole model")
    if request.deepcache and SHALLOW not in manifest.components:
        raise InputError(f"the bundle {bundle.path} has no shallow UNet", hint="export it with --deepcache")
    if shards_of(manifest.components):
        raise InputError(
            f"the UNet of {bundle.path} is in shards, whose memory is not planned yet",
            hint="plan the bundle that is exported without --shards",
        )
    check_pictures(
        request.pictures,
        guidance_scale=request.guidance_scale,
        height_px=request.height_px,
        width_px=request.width_px,
        settings=manifest.pipeline,
        specs=manifest.components,
    )
    graphs = engine_graphs(bundle, target)
    entry = manifest.targets[target]
    engines = {}
    for component, graph in graphs.items():
        sizes = _sizes(manifest.components[component], bundle, request)
        bits = floating_bits(entry.backend, entry.engines[component].options.get("inference_precision"))
        memory = plan_memory(graph.at(sizes, floating_bits=bits))
        engines[component] = EnginePlan(component, sizes, graph.weight_bytes, memory)
    running = {name: engine for name, engine in engines.items() if request.deepcache or name != SHALLOW}
    return PicturePlan(target, request, engines, _stages(running, entry.backend))


def _sizes(spec: ComponentSpec, bundle: Bundle, request: Request) -> dict[str, int]:
    """Sizes of a component's free dimensions, as `Pipeline` calls it."""
    settings = bundle.manifest.pipeline
    rows = min(request.pictures, largest_batch(spec)) if "B" in spec.dimensions else 1
    guided = takes_two_batches(request.guidance_scale, settings)
    if spec.name == "text_encoder":
        rows = min(2 if guided else 1, largest_batch(spec))  # equal prompts run once
    elif spec.name in (*_UNETS, *HOISTED) and guided:
        rows = 2 * request.pictures
    sizes = {
        "B": rows,
        "H": request.height_px // settings.vae_reduction,
        "W": request.width_px // settings.vae_reduction,
        "H_px": request.height_px,
        "W_px": request.width_px,
    }
    return {name: sizes[name] if name in sizes else _part_of(name, sizes) for name in spec.dimensions}


def _part_of(name: str, sizes: Mapping[str, int]) -> int:
    """A size that is named by what it is of others, as the deep features' ``H/2``."""
    size = ir.SymbolicDim(name).evaluate(sizes)
    if not isinstance(size, int):
        raise BundleError(f"nothing says how large {name} is", hint="export the bundle again")
    return size


def _stages(engines: Mapping[str, EnginePlan], backend: str) -> tuple[Stage, ...]:
    """What is in memory while each engine runs; on a GPU plans share their activations' memory."""
    stages: list[Stage] = []
    loaded: dict[str, None] = {}
    activations: list[int] = []
    unets = [name for name in _UNETS if name in engines]
    for component in (name for name in _STAGES if name in engines):
        opened = unets if component in (*HOISTED, *_UNETS) else []
        loaded |= dict.fromkeys([*opened, component])
        memory = engines[component].memory
        own = memory.written.arena.bytes
        activations.append(own)
        # What runs once for a picture does so while the UNet is loaded, and is released then.
        needed = loaded.keys() & {*unets, *HOISTED} if component in HOISTED else {*opened, component}
        stages.append(
            Stage(
                component=component,
                loaded=tuple(loaded),
                weight_bytes=sum(engines[name].weight_bytes for name in loaded),
                activation_bytes=max(activations) if backend == TENSORRT_RTX else sum(activations),
                largest_activation_bytes=max(activations),
                input_bytes=memory.input_bytes,
                released_bytes=sum(engines[name].weight_bytes for name in needed) + own + memory.input_bytes,
            )
        )
    return tuple(stages)
