"""`sdc compare --bisect`: the first pass after which a graph no longer computes what its source does.

Every graph between the exporter's and the lowered one runs on ONNX Runtime with its optimisations off, so that
nothing repairs or hides what a pass did; the finished engine runs on its own backend. Passes are looked at one by one
and not by halves: an error may be hidden by a later pass, and a graph in the middle of the list may break alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdc.compiler.compare.exported import ExportedGraph
from sdc.compiler.compare.judge import BisectionStep, Judge
from sdc.compiler.compare.outputs import draw_feeds
from sdc.compiler.compare.variants import HOIST, Phase
from sdc.compiler.component import Component
from sdc.compiler.plain_json import finite_json
from sdc.engines.errors import InputError, TargetError
from sdc.engines.targets import ONNXRUNTIME_CUDA, Target, runnable

DEFAULT_TOLERANCE = 1e-5
"""Largest relative error of float32 rewrites that compute the same in another order."""


@dataclass(frozen=True)
class Bisection:
    """How far the graph gets.

    Attributes:
        subject: what was compiled, and for what.
        tolerance: of the relative error.
        shapes: sizes of the inputs.
        steps: up to the first that breaks the tolerance.
        broken: its name; None if all keep it.
        not_run: why the engine was not run; None if it was, or was not reached.
    """

    subject: str
    tolerance: float
    shapes: dict[str, tuple[int, ...]]
    steps: tuple[BisectionStep, ...]
    broken: str | None
    not_run: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite error becomes null."""
        value = finite_json(asdict(self))
        assert isinstance(value, dict)
        return value


def bisect_passes(
    graph: ExportedGraph,
    phases: Sequence[Phase],
    target: Target,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
    threads: int | None = None,
    hoist: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Bisection:
    """Apply the passes one after the other until one breaks the tolerance.

    Args:
        graph: before any pass.
        phases: all passes, those of the lowering last.
        target: what the graph is lowered for.
        tolerance: of the relative error.
        seed: of the inputs.
        threads: CPU threads; None leaves it to the backends.
        hoist: as last steps, take out what does not change between steps before the last phase, and run the graphs
            one after the other; then their engines.
        report: told the name of every step.

    Raises:
        InputError: the tolerance is not positive, or the source graph itself does not run.
        TargetError: the target's operators have no kernels for the CPU, on which the graphs between passes run.
    """
    if target.backend == ONNXRUNTIME_CUDA:
        raise TargetError(
            f"graphs between passes run on the CPU, which has no kernels for operators of {target.name!r}",
            hint="bisect for ort-cpu, or see what every pass is worth with --ablate on a GPU",
        )
    if not tolerance > 0:
        raise InputError(f"the tolerance must be positive, found {tolerance:g}")
    feeds = draw_feeds(graph.spec, seed=seed)
    not_run = runnable(target)
    with tempfile.TemporaryDirectory(prefix="sdc-bisect-") as scratch:
        judge = Judge(feeds, Path(scratch), threads)
        model = ir.load(graph.path)
        judge.take_reference(model, graph)
        steps: list[BisectionStep] = []
        for name, step in _steps(judge, graph, model, phases, target, hoist=hoist, runs=not_run is None):
            report(name)
            steps.append(step())
            if not steps[-1].error <= tolerance:
                break
    broken = steps[-1].name if steps and not steps[-1].error <= tolerance else None
    return Bisection(
        subject=f"{graph.origin}, target {target.name}",
        tolerance=tolerance,
        shapes={name: feed.shape for name, feed in feeds.items()},
        steps=tuple(steps),
        broken=broken,
        not_run=None if broken else not_run,
    )


def _steps(
    judge: Judge,
    graph: ExportedGraph,
    model: ir.Model,
    phases: Sequence[Phase],
    target: Target,
    *,
    hoist: bool,
    runs: bool,
) -> Iterator[tuple[str, Callable[[], BisectionStep]]]:
    """All steps in order, each to be called before the next is asked for."""
    typed = model
    for phase in phases:
        if hoist and phase is phases[-1]:
            typed = model.clone()
        for each in phase.passes:
            name = f"{phase.name}: {each.name}"
            yield name, partial(judge.after_pass, name, each, model)
    whole = [Component(graph.spec, model)]
    if runs:
        yield f"engine: {target.name}", partial(judge.engines, f"engine: {target.name}", whole, target)
    if hoist:
        hoisted: list[Component] = []
        yield HOIST, partial(judge.hoist, Component(graph.spec, typed), hoisted)
        if runs and len(hoisted) > 1:
            name = f"engine: {target.name}, hoisted"
            lowering = phases[-1].passes if phases else ()
            yield name, partial(judge.engines, name, hoisted, target, lowering)
