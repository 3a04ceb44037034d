"""What one engine takes when pictures are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from sdc.compiler.memory.engine_graphs import computes_in_bf16, engine_graphs, floating_bits
from sdc.compiler.memory.onnxruntime_activations import as_onnxruntime_holds, expanded_weights
from sdc.compiler.memory.onnxruntime_arena import touched_bytes
from sdc.compiler.memory.onnxruntime_engines import held_by_onnxruntime, read_graph
from sdc.compiler.memory.openvino_activations import as_openvino_holds
from sdc.compiler.memory.openvino_engines import HeldEngine, read_held_engine
from sdc.engines.bundle import Bundle
from sdc.engines.errors import BundleError
from sdc.engines.generation import largest_batch, takes_two_batches
from sdc.engines.kernels.library import find_convolver, find_image_kernels
from sdc.engines.measures import NO_MEASURES, Measures
from sdc.engines.sessions import EngineSource
from sdc.engines.sessions.onnxruntime_regions import SHARED, Regions, regions_of
from sdc.engines.sessions.openvino import read_engine
from sdc.engines.sessions.openvino_convolution import convolutions_taken
from sdc.engines.sessions.openvino_gate import gates_taken
from sdc.engines.sessions.openvino_group_norm import sums_taken
from sdc.engines.specs import HOISTED, SHALLOW, ComponentSpec, is_shard_name
from sdc.engines.targets import ONNXRUNTIME, OPENVINO, TENSORRT_RTX
from sdc.passes.memory.buffers import SizedGraph
from sdc.passes.memory.lifetimes import write_in_place
from sdc.passes.memory.plan import MemoryPlan, plan_memory

UNETS = ("unet", SHALLOW)
"""Engines that run in turn; `Networks` opens their sessions before those of `HOISTED`, though they run later."""


@dataclass(frozen=True)
class Request:
    """Pictures of one call.

    Attributes:
        height_px: of each; likewise ``width_px``.
        pictures: of one prompt.
        guidance_scale: above 1 the UNet gets two rows a picture, unless it takes the guidance as an input.
        deepcache: whether a shallow UNet runs in turn with the whole one.
        measures: what is done to take less memory.
        prefetch: whether engines are loaded while others run, where the backend gains by it; as `sdc run` does.
    """

    height_px: int
    width_px: int
    pictures: int
    guidance_scale: float
    deepcache: bool = False
    measures: Measures = NO_MEASURES
    prefetch: bool = True

    @property
    def groups(self) -> int:
        """How often pictures are denoised, one group after the other."""
        return -(-self.pictures // (self.measures.pictures_at_once or self.pictures))


@dataclass(frozen=True)
class EnginePlan:
    """One engine.

    Attributes:
        component: its name.
        sizes: of its free dimensions.
        weight_bytes: as they are stored.
        held: what it holds once it is loaded, beside activations.
        memory: of its activations.
        workspace_bytes: of our own attention kernels; those of all engines share it, and it stays.
        result_bytes: of outputs that are held beside the activations.
        growth_bytes: what the backend's arena has beyond ours for the activations.
        shares_arena: whether its activations lie where those of others lie that do.
    """

    component: str
    sizes: Mapping[str, int]
    weight_bytes: int
    held: HeldEngine
    memory: MemoryPlan
    workspace_bytes: int = 0
    result_bytes: int = 0
    growth_bytes: int = 0
    shares_arena: bool = False

    @property
    def activation_bytes(self) -> int:
        """Of one run, as they share memory in the order of the graph, and its results."""
        return self.memory.written.arena.bytes + self.growth_bytes + self.result_bytes

    @property
    def total_bytes(self) -> int:
        """All that it takes by itself, the caller's inputs and copy of the results with it."""
        running = self.activation_bytes + self.workspace_bytes + self.memory.input_bytes + self.result_bytes
        return self.held.weight_bytes + self.held.graph_bytes + max(running, self.held.page_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        memory = self.memory
        return {
            "sizes": dict(self.sizes),
            "weight_bytes": self.weight_bytes,
            "held_weight_bytes": self.held.weight_bytes,
            "graph_bytes": self.held.graph_bytes,
            "workspace_bytes": self.workspace_bytes,
            "result_bytes": self.result_bytes,
            "growth_bytes": self.growth_bytes,
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


class EnginePlanner:
    """Plans the engines of one target of a bundle; equal questions are answered once.

    Raises:
        BundleError: the bundle says too little of an engine.
        TargetError: it has no such target.
    """

    def __init__(self, bundle: Bundle, target: str) -> None:
        self.bundle = bundle
        self.graphs = engine_graphs(bundle, target)
        self.entry = bundle.manifest.targets[target]
        self._held: dict[tuple[str, frozenset[str], frozenset[str]], HeldEngine] = {}
        self._models: dict[str, Any] = {}
        self._plans: dict[tuple[str, tuple[tuple[str, int], ...]], EnginePlan] = {}

    def plan(self, component: str, request: Request) -> EnginePlan:
        """The plan of one engine for a request."""
        sizes = component_sizes(self.bundle.manifest.components[component], self.bundle, request)
        key = component, tuple(sizes.items())
        if key not in self._plans:
            bits, in_openvino = self._bits(component), self.entry.backend == OPENVINO
            # A shard's buffers have sizes of the whole network, which its own interface need not have.
            of_graph = network_sizes(self.bundle.manifest.components[component], self.bundle, request) | sizes
            graph = self.graphs[component].at(of_graph, floating_bits=bits)
            if in_openvino:
                graph = as_openvino_holds(graph, self._sums(component, sizes))
            in_arena = self.entry.backend == ONNXRUNTIME
            if in_arena:
                graph = as_onnxruntime_holds(graph, expanded_weights(self._onnx_graph(component)))
            # OpenVINO's kernels write over operands where they can, ONNX Runtime's where its graph says so.
            memory = plan_memory(graph, in_place=in_openvino or in_arena)
            regions = self._regions(component) if in_arena else None
            self._plans[key] = EnginePlan(
                component,
                sizes,
                weight_bytes=self.graphs[component].weight_bytes,
                held=self._holds(component, sizes),
                memory=memory,
                growth_bytes=touched_bytes(write_in_place(graph), regions) - memory.written.arena.bytes
                if regions
                else 0,
                shares_arena=regions is SHARED or self.entry.backend == TENSORRT_RTX,
                workspace_bytes=_attention_bytes(graph) if in_openvino and bits == 16 else 0,
                result_bytes=self._result_bytes(component, of_graph) if in_openvino else 0,
            )
        return self._plans[key]

    def _bits(self, component: str) -> int | None:
        return floating_bits(self.entry.backend, self.entry.engines[component].options.get("inference_precision"))

    def _regions(self, component: str) -> Regions:
        """Of ONNX Runtime's arena, as `OnnxRuntimeSession` decides."""
        files = self.bundle.manifest.files
        return regions_of(sum(files[name].bytes for name in self.entry.engines[component].files))

    def _result_bytes(self, component: str, sizes: Mapping[str, int]) -> int:
        """Of the outputs in their own type: the arena has them in that of the arithmetic."""
        graph = self.graphs[component]
        return sum(graph.buffers[output].bytes_at(sizes) for output in graph.outputs)

    def _holds(self, component: str, sizes: Mapping[str, int]) -> HeldEngine:
        if self.entry.backend == ONNXRUNTIME:
            return held_by_onnxruntime(self._onnx_graph(component))
        if self.entry.backend != OPENVINO:
            return HeldEngine(self.graphs[component].weight_bytes, 0)
        packed, gated = self._in_kernels(component, sizes)
        if (component, packed, gated) not in self._held:
            self._held[component, packed, gated] = read_held_engine(
                self.bundle.file(self.entry.engines[component].files[0]),
                self._bits(component) or 32,
                bf16_bits=16 if computes_in_bf16() else 32,
                packed=packed,
                gated=gated,
            )
        return self._held[component, packed, gated]

    def _onnx_graph(self, component: str) -> ir.Graph:
        if component not in self._models:
            self._models[component] = read_graph(self.bundle.file(self.entry.engines[component].files[0]))
        graph: ir.Graph = self._models[component]
        return graph

    def _in_kernels(self, component: str, sizes: Mapping[str, int]) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the convolutions and of the MatMuls that run in our own kernels, as `OpenVinoSession` decides."""
        if self._bits(component) != 16 or find_convolver() is None:
            return frozenset(), frozenset()
        model = self._model(component, sizes)
        return convolutions_taken(*model), gates_taken(*model)

    def _sums(self, component: str, sizes: Mapping[str, int]) -> frozenset[str]:
        """Names of the sums that our own kernels compute with the norm behind them, as `OpenVinoSession` decides."""
        if self._bits(component) != 16 or find_image_kernels() is None:
            return frozenset()
        return sums_taken(*self._model(component, sizes))

    def _model(self, component: str, sizes: Mapping[str, int]) -> tuple[Any, dict[str, tuple[int, ...]]]:
        """An engine of OpenVINO as it is read, and the shapes of its inputs."""
        spec = self.bundle.manifest.components[component]
        if component not in self._models:
            engine = self.entry.engines[component]
            files = tuple(map(self.bundle.file, engine.files))
            self._models[component] = read_engine(EngineSource(spec, OPENVINO, files, engine.options))
        shapes = {
            tensor.name: tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape)
            for tensor in spec.inputs
        }
        return self._models[component], shapes


def _attention_bytes(graph: SizedGraph) -> int:
    """What our kernels for bfloat16 take: keys and values of the largest attention, packed, and its result."""
    attentions = [step for step in graph.steps if step.operator == "Attention"]
    return 3 * max((graph.bytes[operand] for step in attentions for operand in step.reads), default=0)


def component_sizes(spec: ComponentSpec, bundle: Bundle, request: Request) -> dict[str, int]:
    """Sizes of a component's free dimensions, as `Pipeline` calls it."""
    sizes = network_sizes(spec, bundle, request)
    return {name: sizes[name] if name in sizes else _part_of(name, sizes) for name in spec.dimensions}


def network_sizes(spec: ComponentSpec, bundle: Bundle, request: Request) -> dict[str, int]:
    """Sizes by the names that interfaces of networks have for them, when a component is called."""
    settings, measures = bundle.manifest.pipeline, request.measures
    guided = takes_two_batches(request.guidance_scale, settings)
    height_px, width_px = request.height_px, request.width_px
    rows = request.pictures
    if spec.name == "text_encoder":
        rows = 2 if guided else 1  # equal prompts run once
    elif spec.name in (*UNETS, *HOISTED) or is_shard_name(spec.name):
        rows = min(rows, measures.pictures_at_once or rows) * (2 if guided else 1)
    elif spec.name == "vae_decoder":
        rows = min(rows, measures.decoded_at_once or rows)
        if measures.tile_px is not None:
            height_px, width_px = min(height_px, measures.tile_px[0]), min(width_px, measures.tile_px[1])
    whole = bundle.manifest.components["unet"] if is_shard_name(spec.name) else spec
    return {
        "B": min(rows, largest_batch(whole)) if "B" in whole.dimensions else 1,
        "H": height_px // settings.vae_reduction,
        "W": width_px // settings.vae_reduction,
        "H_px": height_px,
        "W_px": width_px,
    }


def _part_of(name: str, sizes: Mapping[str, int]) -> int:
    """A size that is named by what it is of others, as the deep features' ``H/2``."""
    size = ir.SymbolicDim(name).evaluate(sizes)
    if not isinstance(size, int):
        raise BundleError(f"nothing says how large {name} is", hint="export the bundle again")
    return size
