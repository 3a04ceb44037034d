"""What is in memory while each engine of a picture runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdc.compiler.memory.engine_plan import UNETS, EnginePlan, Request
from sdc.engines.load_ahead import loads_unet_ahead
from sdc.engines.specs import HOISTED
from sdc.engines.targets import OPENVINO

BEFORE, BEHIND = ("text_encoder", *HOISTED), ("vae_decoder",)
STAGES = (*BEFORE, *UNETS, *BEHIND)
"""Engines in the order in which `Pipeline` runs them; shards stand in the place of the UNet's."""

_NO_SHARDS: Mapping[str, int] = {}

_FLOAT32_BYTES = 4
_COLOURS = 3


@dataclass(frozen=True)
class Stage:
    """What is in memory while one engine runs.

    Attributes:
        component: the engine.
        loaded: engines that are in memory.
        weight_bytes: theirs, as they are held; likewise ``graph_bytes``.
        activation_bytes: of the engine that runs, and what those before it keep.
        largest_activation_bytes: of one engine: what all would need that share an arena.
        input_bytes: of the engine that runs; they are the caller's, who has the UNet's for all pictures.
        picture_bytes: of pictures that are decoded.
        released_bytes: all of it, if engines are released as soon as a picture does not need them any more.
    """

    component: str
    loaded: tuple[str, ...]
    weight_bytes: int
    graph_bytes: int
    activation_bytes: int
    largest_activation_bytes: int
    input_bytes: int
    picture_bytes: int
    released_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self._beside_activations + self.activation_bytes

    @property
    def one_arena_bytes(self) -> int:
        """All of it, if the engines shared one arena."""
        return self._beside_activations + self.largest_activation_bytes

    @property
    def _beside_activations(self) -> int:
        return self.weight_bytes + self.graph_bytes + self.input_bytes + self.picture_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "component": self.component,
            "loaded": list(self.loaded),
            "weight_bytes": self.weight_bytes,
            "graph_bytes": self.graph_bytes,
            "activation_bytes": self.activation_bytes,
            "input_bytes": self.input_bytes,
            "picture_bytes": self.picture_bytes,
            "total_bytes": self.total_bytes,
            "released_bytes": self.released_bytes,
        }


def plan_stages(
    engines: Mapping[str, EnginePlan],
    backend: str,
    request: Request,
    *,
    passing: Collection[str] = (),
    shards: Mapping[str, int] = _NO_SHARDS,
) -> tuple[Stage, ...]:
    """The stages of a picture, in their order.

    Args:
        engines: those that run.
        backend: of them all.
        request: what is drawn.
        passing: engines that are released when they have run (`Networks.predictor`).
        shards: of the UNet, in order, and bytes of the arrays that are there while each runs. A shard is released when
            it has run too, and while it runs the next one is loaded, behind the last the first.

    A UNet that is loaded ahead counts as compiled when an engine runs, and its file's last pages as not yet let go of:
    how far it is then depends on the machine, so this is the most that can be held at the same time. Where engines are
    released it is not compiled while the text encoder is in memory, and has what our kernels have packed.
    """
    stages: list[Stage] = []
    loaded: dict[str, None] = {}
    activations: dict[str, int] = {}
    workspace = 0
    unets = [name for name in UNETS if name in engines]
    ahead = [name for name in unets[:1] if loads_unet_ahead(backend, prefetch=request.prefetch)]
    following = _following(shards) if request.prefetch else {}
    for component in (name for name in (*BEFORE, *UNETS, *shards, *BEHIND) if name in engines):
        opened = unets if component in (*HOISTED, *UNETS) else ahead
        compiled = [following[component]] if component in following else ahead if component in BEFORE else []
        loaded |= dict.fromkeys([*opened, component, *compiled])
        engine = engines[component]
        activations[component] = engine.activation_bytes
        pictures = decoded_bytes(engine, request) if component == "vae_decoder" else 0
        inputs = shards.get(component, engine.memory.input_bytes * (request.groups if component in UNETS else 1))
        # From the second step on it is as large as a shard behind this one needs it.
        sharing = shards if component in shards else [component]
        workspace = max(workspace, *(engines[name].workspace_bytes for name in sharing))
        needed = [component, *compiled] if component in shards else _needed(component, loaded, ahead)
        # What engines touch of an arena that they share can stay until the next is opened or closed.
        beside = [name for name in needed if name in activations and engine.shares_arena and engines[name].shares_arena]
        running = max(activations[name] for name in {component, *beside}) + workspace + inputs + pictures
        running += sum(engines[name].held.page_bytes for name in compiled)
        held = {
            name: engines[name].held.graph_bytes + _weights_in_memory(engines[name], component, ahead, backend)
            for name in needed
        }
        # A shard is compiled before the next one is loaded.
        compiling = shards[component] + held[component] if component in shards else sum(held.values())
        stages.append(
            Stage(
                component=component,
                loaded=tuple(loaded),
                weight_bytes=sum(engines[name].held.weight_bytes for name in loaded),
                graph_bytes=sum(engines[name].held.graph_bytes for name in loaded),
                activation_bytes=workspace + _together(activations, engines),
                largest_activation_bytes=workspace + max(activations.values()),
                input_bytes=inputs,
                picture_bytes=pictures,
                released_bytes=max(sum(held.values()) + running, compiling + engine.held.page_bytes),
            )
        )
        if component in passing or component in shards:
            del loaded[component], activations[component]
    return tuple(stages)


def _together(activations: Mapping[str, int], engines: Mapping[str, EnginePlan]) -> int:
    """Of engines that stay: in arenas of their own, and in one that the others share."""
    shared = [count for name, count in activations.items() if engines[name].shares_arena]
    return sum(activations.values()) - sum(shared) + max(shared, default=0)


def _following(shards: Iterable[str]) -> dict[str, str]:
    """The shard that is loaded while each runs."""
    names = list(shards)
    return dict(zip(names, [*names[1:], *names[:1]], strict=True))


def _needed(component: str, loaded: Iterable[str], ahead: Sequence[str]) -> list[str]:
    """Engines that are in memory while one runs, if they are released when a picture does not need them any more."""
    if component in UNETS:
        return [name for name in loaded if name in UNETS]
    if component in HOISTED:  # they run while the UNet is loaded, and are released then
        return [name for name in loaded if name in (*UNETS, *HOISTED)]
    return [component, *ahead] if component == "text_encoder" else [component]


def _weights_in_memory(engine: EnginePlan, running: str, ahead: Sequence[str], backend: str) -> int:
    """Bytes of an engine's weights while another runs, if engines are released; OpenVINO compiles at the first run."""
    if backend != OPENVINO or engine.component not in UNETS or running in UNETS:
        return engine.held.weight_bytes
    if engine.component not in ahead:
        return 0
    return engine.held.packed_bytes if running == "text_encoder" else engine.held.weight_bytes


def decoded_bytes(decoder: EnginePlan, request: Request) -> int:
    """Of decoded pictures as the runtime holds them, in float32: all, what one run gives, and a strip of tiles."""
    whole = _COLOURS * _FLOAT32_BYTES * request.height_px * request.width_px
    held = request.pictures * whole
    tile = request.measures.tile_px
    if tile is None:
        return held + (0 if decoder.sizes.get("B", 1) >= request.pictures else decoder.sizes.get("B", 1) * whole)
    height, width = min(tile[0], request.height_px), min(tile[1], request.width_px)
    tall_strip = request.pictures * _COLOURS * _FLOAT32_BYTES * height * request.width_px
    return held + tall_strip + (tall_strip * width // request.width_px if width < request.width_px else 0)
