"""One engine for each pass that changes something: the graph after it, lowered for a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from sdc.compiler.build import build_engine
from sdc.compiler.calibration.options import CalibrationOptions
from sdc.compiler.compare.exported import ExportedGraph
from sdc.compiler.compare.structure import StructureDigests
from sdc.compiler.component import Component
from sdc.compiler.export_plan import HOISTED_FROM
from sdc.compiler.hoisting import hoist_component
from sdc.compiler.precision.capabilities import in_float32
from sdc.compiler.stages import quantising_passes
from sdc.engines.sessions import EngineSource
from sdc.engines.targets import Target, runnable
from sdc.passes.base import Pass, run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes, precision_passes

HOIST = "hoisting: hoist"
"""The last step of a component that runs in a loop."""


@dataclass(frozen=True)
class Phase:
    """Passes of one phase of `passes/pipeline.py`, in order."""

    name: str
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Variant:
    """The graph after some of the passes, lowered.

    Attributes:
        passes: those since the variant before, as "phase: name"; only the last one changed the lowered graph.
        nodes: of the lowered graph.
        source: its engine; None where none can be run here.
        engine_bytes: size of its files.
        beside: engines of what was hoisted out of it, in the order in which they run; their results are its inputs.
    """

    passes: tuple[str, ...]
    nodes: int
    source: EngineSource | None
    engine_bytes: int = 0
    beside: tuple[EngineSource, ...] = ()


@dataclass(frozen=True)
class Variants:
    """All variants of a graph.

    Attributes:
        rows: the first is the exported graph, lowered and nothing else.
        idle: passes after the last row's; they change nothing.
    """

    rows: tuple[Variant, ...]
    idle: tuple[str, ...]


def phases_before_lowering(
    component: str,
    precision: str,
    *,
    quantise: tuple[Pass, ...] = (),
    correct: tuple[Pass, ...] = (),
    rest: str = "fp16",
    backend: str | None = None,
) -> tuple[Phase, ...]:
    """Everything that happens to a graph before it is lowered; hoisting is no pass, and not among it.

    Args:
        component: name of the network.
        precision: one of `PRECISIONS`.
        quantise: for "int8"; see `default_quantising`, likewise `correct`.
        rest: "fp16" or "fp32", for what "int8" leaves alone.
        backend: what the graph will be lowered for; None for what all have in common.

    Raises:
        InputError: an unknown precision, or "int8" without `quantise`, or another one with it.
    """
    return (
        Phase("canonical", canonical_passes()),
        Phase("fusion", fusion_passes(component)),
        Phase(
            "precision",
            precision_passes(
                precision,
                quantise=quantise,
                correct=correct,
                remainder=rest,
                backend=backend,
                component=component,
            ),
        ),
    )


def default_quantising(table: Path | None, target: Target) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes with which `sdc export` quantises for a target, and corrects biases, where nothing else is asked for.

    There are none without a table.

    Raises:
        InputError: the file is no calibration.
    """
    if table is None:
        return (), ()
    options = CalibrationOptions()
    return quantising_passes(table, options.rule_for(target), None, correct_bias=options.correct_bias)


def all_phases(component: str, precision: str, target: Target, *, table: Path | None = None) -> tuple[Phase, ...]:
    """All that happens to a graph on its way to a target, the lowering last.

    Raises:
        InputError: as there.
    """
    quantise, correct = default_quantising(table, target)
    rest = "fp32" if in_float32(target) else "fp16"
    before = phases_before_lowering(
        component, precision, quantise=quantise, correct=correct, rest=rest, backend=target.backend
    )
    return (*before, Phase("lowering", lowering_passes(target.backend)))


def is_hoisted(graph: ExportedGraph) -> bool:
    """Whether `sdc export` takes what does not change between steps out of a graph."""
    return graph.spec.name in HOISTED_FROM


def build_variants(
    graph: ExportedGraph,
    phases: Sequence[Phase],
    target: Target,
    folder: Path,
    *,
    hoist: bool = False,
) -> Variants:
    """Build the engines below `folder`; nothing is built for a target that this machine cannot run.

    Args:
        graph: before any pass.
        phases: before lowering.
        target: what the engines are for.
        folder: receives a folder for each.
        hoist: as a last step, take out what does not change between steps.
    """
    digests = StructureDigests()
    model = ir.load(graph.path)
    rows: list[Variant] = []
    pending: list[str] = []
    last_plain, last_lowered = "", ""
    for label, each in _steps(phases):
        if each is not None:
            each.run(model)
            pending.append(label)
        plain = digests.digest(model)
        if plain == last_plain:
            continue
        lowered = _lower(model, target)
        digest = digests.digest(lowered)
        last_plain = plain
        if digest == last_lowered:
            continue
        last_lowered = digest
        rows.append(_variant(Component(graph.spec, lowered), tuple(pending), target, folder / f"{len(rows):02d}"))
        pending = []
    if hoist:
        hoisted, _ = hoist_component(Component(graph.spec, model))
        pending.append(HOIST)
        if len(hoisted) > 1:
            rows.append(_hoisted_variant(hoisted, tuple(pending), target, folder / "hoisted"))
            pending = []
    return Variants(tuple(rows), tuple(pending))


def _steps(phases: Sequence[Phase]) -> Iterator[tuple[str, Pass | None]]:
    """Nothing at first, then every pass."""
    yield "", None
    for phase in phases:
        for each in phase.passes:
            yield f"{phase.name}: {each.name}", each


def _lower(model: ir.Model, target: Target) -> ir.Model:
    lowered = model.clone()
    run_passes(lowering_passes(target.backend), lowered)
    return lowered


def _hoisted_variant(hoisted: Sequence[Component], passes: tuple[str, ...], target: Target, folder: Path) -> Variant:
    """The engine that runs at each step, and those beside it."""
    variants = []
    for component in hoisted:
        run_passes(lowering_passes(target.backend), component.model)
        variants.append(_variant(component, passes, target, folder / component.spec.name))
    step, *others = variants
    return replace(step, beside=tuple(each.source for each in others if each.source is not None))


def _variant(component: Component, passes: tuple[str, ...], target: Target, folder: Path) -> Variant:
    nodes = len(component.model.graph)
    if runnable(target) is not None:
        return Variant(passes, nodes, None)
    built = build_engine(component, target, folder)
    files = tuple(folder / name for name in built.files)
    return Variant(
        passes=passes,
        nodes=nodes,
        source=EngineSource(component.spec, target.backend, files, built.options, target.compute_capabilities),
        engine_bytes=sum(file.stat().st_size for file in files),
    )
