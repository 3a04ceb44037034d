"""`sdc compare --bisect`: the first pass after which a graph no longer computes what its source does.

Every graph between the exporter's and the lowered one runs on ONNX Runtime with its optimisations off, so that
nothing repairs or hides what a pass did; the finished engine runs on its own backend. Passes are looked at one by one
and not by halves: an error may be hidden by a later pass, and a graph in the middle of the list may break alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sdc.compiler.build import build_engine
from sdc.compiler.build.built import one_line, save_onnx
from sdc.compiler.compare.exported import ExportedGraph
from sdc.compiler.compare.outputs import draw_feeds
from sdc.compiler.compare.structure import StructureDigests
from sdc.compiler.compare.variants import Phase
from sdc.compiler.component import Component
from sdc.compiler.plain_json import finite_json
from sdc.engines.errors import InputError, SdcError
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.targets import Target, runnable

DEFAULT_TOLERANCE = 1e-5
"""Largest relative error of float32 rewrites that compute the same in another order."""

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class BisectionStep:
    """The graph after one pass, or the engine.

    Attributes:
        name: "phase: pass", or "engine: target".
        nodes: of the graph.
        error: largest difference of all outputs from the source graph's, relative to the output's largest magnitude;
            0 if the pass changed nothing; infinite if a shape differs or a value is not finite.
        failure: why it could not be run; None if it was.
    """

    name: str
    nodes: int
    error: float
    failure: str | None = None


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
        report: told the name of every step.

    Raises:
        InputError: the tolerance is not positive, or the source graph itself does not run.
    """
    if not tolerance > 0:
        raise InputError(f"the tolerance must be positive, found {tolerance:g}")
    feeds = draw_feeds(graph.spec, seed=seed)
    with tempfile.TemporaryDirectory(prefix="sdc-bisect-") as scratch:
        judge = _Judge(feeds, Path(scratch), threads)
        model = ir.load(graph.path)
        judge.take_reference(model, graph)
        steps: list[BisectionStep] = []
        broken = None
        for phase in phases:
            for each in phase.passes:
                name = f"{phase.name}: {each.name}"
                report(name)
                try:
                    each.run(model)
                    step = judge.step(name, model)
                except SdcError as error:
                    step = BisectionStep(name, len(model.graph), float("inf"), one_line(error))
                steps.append(step)
                if not step.error <= tolerance:
                    broken = name
                    break
            if broken:
                break
        not_run = None if broken else runnable(target)
        if broken is None and not_run is None:
            steps.append(judge.engine(graph, model, target))
            broken = steps[-1].name if not steps[-1].error <= tolerance else None
    return Bisection(
        subject=f"{graph.origin}, target {target.name}",
        tolerance=tolerance,
        shapes={name: feed.shape for name, feed in feeds.items()},
        steps=tuple(steps),
        broken=broken,
        not_run=not_run,
    )


class _Judge:
    """Runs graphs and engines, and compares them with the source graph."""

    def __init__(self, feeds: Outputs, folder: Path, threads: int | None) -> None:
        self._feeds = feeds
        self._folder = folder
        self._threads = threads
        self._digests = StructureDigests()
        self._last = ""
        self._error = 0.0
        self._reference: Outputs = {}

    def take_reference(self, model: ir.Model, graph: ExportedGraph) -> None:
        """Run the source graph."""
        try:
            self._reference = self._run_plainly(model)
        except RuntimeError as error:
            raise InputError(
                f"ONNX Runtime cannot run {graph.origin}: {error}", hint="check the file, or choose another component"
            ) from error
        broken = [name for name, value in self._reference.items() if not np.isfinite(value).all()]
        if broken:
            raise InputError(
                f"{graph.origin} gives NaN or infinity in {', '.join(broken)} before any pass",
                hint="bisect a graph whose outputs are finite",
            )
        self._last = self._digests.digest(model)

    def step(self, name: str, model: ir.Model) -> BisectionStep:
        """Compare the graph after a pass; one that is as before is not run again."""
        digest = self._digests.digest(model)
        if digest != self._last:
            self._last = digest
            try:
                self._error = relative_error(self._reference, self._run_plainly(model))
            except RuntimeError as error:
                return BisectionStep(name, len(model.graph), float("inf"), str(error))
        return BisectionStep(name, len(model.graph), self._error)

    def engine(self, graph: ExportedGraph, model: ir.Model, target: Target) -> BisectionStep:
        """Build the engine, run it on its backend, and compare."""
        name = f"engine: {target.name}"
        try:
            built = build_engine(Component(graph.spec, model), target, self._folder / "engine")
            files = tuple(self._folder / "engine" / file for file in built.files)
            source = EngineSource(graph.spec, target.backend, files, built.options, target.compute_capabilities)
            with open_session(source, threads=self._threads) as session:
                error = relative_error(self._reference, session.run(self._feeds))
        except SdcError as failure:
            return BisectionStep(name, len(model.graph), float("inf"), one_line(failure))
        return BisectionStep(name, len(model.graph), error)

    def _run_plainly(self, model: ir.Model) -> dict[str, np.ndarray]:
        """Outputs on ONNX Runtime as the graph stands.

        Raises:
            RuntimeError: ONNX Runtime refuses it.
        """
        import onnxruntime

        from sdc.engines.sessions.onnxruntime import PROVIDERS, session_options

        options = session_options(self._threads)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = self._folder / "model.onnx"
        save_onnx(model, path)
        try:
            session = onnxruntime.InferenceSession(path, options, providers=PROVIDERS)
            names = [output.name for output in session.get_outputs()]
            return dict(zip(names, session.run(names, dict(self._feeds)), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise RuntimeError(one_line(error)) from error


def relative_error(wanted: Outputs, found: Outputs) -> float:
    """Largest difference of all outputs, relative to their largest magnitude; infinite if they are not comparable."""
    errors = [0.0]
    for name, value in wanted.items():
        other = found.get(name)
        if other is None or other.shape != value.shape or not (np.isfinite(value).all() and np.isfinite(other).all()):
            return float("inf")
        largest = float(np.abs(value).max()) or 1.0
        errors.append(float(np.abs(other.astype(np.float64) - value).max()) / largest)
    return max(errors)
