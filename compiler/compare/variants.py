"""One engine for each pass that changes something: the graph after it, lowered for a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from sdc.compiler.build import build_engine
from sdc.compiler.compare.exported import ExportedGraph
from sdc.compiler.compare.structure import StructureDigests
from sdc.compiler.component import Component
from sdc.engines.errors import InputError
from sdc.engines.sessions import EngineSource
from sdc.engines.targets import Target, runnable
from sdc.passes.base import Pass, run_passes
from sdc.passes.pipeline import canonical_passes, fusion_passes, lowering_passes, precision_passes

PRECISIONS = ("fp32", "fp16")


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
    """

    passes: tuple[str, ...]
    nodes: int
    source: EngineSource | None
    engine_bytes: int = 0


@dataclass(frozen=True)
class Variants:
    """All variants of a graph.

    Attributes:
        rows: the first is the exported graph, lowered and nothing else.
        idle: passes after the last row's; they change nothing.
    """

    rows: tuple[Variant, ...]
    idle: tuple[str, ...]


def target_independent_phases(component: str, precision: str) -> tuple[Phase, ...]:
    """Everything that happens to a graph before it is lowered.

    Raises:
        InputError: the precision needs more than the graph.
    """
    if precision not in PRECISIONS:
        raise InputError(
            f"pass by pass, the precision {precision!r} cannot be compared", hint=f"choose {' or '.join(PRECISIONS)}"
        )
    return (
        Phase("canonical", canonical_passes()),
        Phase("fusion", fusion_passes(component)),
        Phase("precision", precision_passes(precision)),
    )


def all_phases(component: str, precision: str, target: Target) -> tuple[Phase, ...]:
    """Likewise, and the lowering for a target.

    Raises:
        InputError: the precision needs more than the graph.
    """
    return (*target_independent_phases(component, precision), Phase("lowering", lowering_passes(target.backend)))


def build_variants(
    graph: ExportedGraph,
    phases: Sequence[Phase],
    target: Target,
    folder: Path,
) -> Variants:
    """Build the engines below `folder`; nothing is built for a target that this machine cannot run.

    Args:
        graph: before any pass.
        phases: before lowering.
        target: what the engines are for.
        folder: receives a folder for each.
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
        rows.append(_variant(graph, lowered, tuple(pending), target, folder / f"{len(rows):02d}"))
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


def _variant(graph: ExportedGraph, lowered: ir.Model, passes: tuple[str, ...], target: Target, folder: Path) -> Variant:
    if runnable(target) is not None:
        return Variant(passes, len(lowered.graph), None)
    built = build_engine(Component(graph.spec, lowered), target, folder)
    files = tuple(folder / name for name in built.files)
    return Variant(
        passes=passes,
        nodes=len(lowered.graph),
        source=EngineSource(graph.spec, target.backend, files, built.options, target.compute_capabilities),
        engine_bytes=sum(file.stat().st_size for file in files),
    )
