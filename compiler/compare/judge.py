"""Runs graphs and engines of one component, and compares them with the graph that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdc.compiler.build import build_engine
from sdc.compiler.build.built import one_line, save_onnx
from sdc.compiler.compare.exported import ExportedGraph
from sdc.compiler.compare.structure import StructureDigests
from sdc.compiler.compare.variants import HOIST
from sdc.compiler.component import Component
from sdc.compiler.hoisting import hoist_component
from sdc.engines.errors import InputError, SdcError
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.targets import Target
from sdc.passes.base import Pass, run_passes

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


class Judge:
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

    def after_pass(self, name: str, each: Pass, model: ir.Model) -> BisectionStep:
        """Run a pass and compare the graph; one that is as before is not run again."""
        try:
            each.run(model)
            digest = self._digests.digest(model)
            if digest != self._last:
                self._last = digest
                self._error = relative_error(self._reference, self._run_plainly(model))
        except Exception as failure:  # a pass that dies of anything is the one that is looked for
            return _failed(name, model, failure)
        return BisectionStep(name, len(model.graph), self._error)

    def hoist(self, component: Component, hoisted: list[Component]) -> BisectionStep:
        """Hoist, and compare what the graphs give one after the other; `hoisted` receives them."""
        try:
            hoisted += hoist_component(component)[0]
            values = dict(self._feeds)
            for each in (*hoisted[1:], hoisted[0]):
                outputs = self._run_plainly(each.model, values)
                values |= outputs
            error = relative_error(self._reference, outputs)
        except (SdcError, RuntimeError) as failure:
            return _failed(HOIST, component.model, failure)
        return BisectionStep(HOIST, len(component.model.graph), error)

    def engines(
        self, name: str, components: Sequence[Component], target: Target, lowering: Sequence[Pass] = ()
    ) -> BisectionStep:
        """Lower and build the engines, run them on their backend, the first last, and compare."""
        model = components[0].model
        try:
            for component in components:
                run_passes(lowering, component.model)
            values = dict(self._feeds)
            for component in (*components[1:], components[0]):
                outputs = self._run_engine(component, target, values)
                values |= outputs
            error = relative_error(self._reference, outputs)
        except SdcError as failure:
            return _failed(name, model, failure)
        return BisectionStep(name, len(model.graph), error)

    def _run_engine(self, component: Component, target: Target, values: Outputs) -> dict[str, np.ndarray]:
        folder = self._folder / component.spec.name
        built = build_engine(component, target, folder)
        files = tuple(folder / file for file in built.files)
        source = EngineSource(component.spec, target.backend, files, built.options, target.compute_capabilities)
        with open_session(source, threads=self._threads) as session:
            return dict(session.run({tensor.name: values[tensor.name] for tensor in component.spec.inputs}))

    def _run_plainly(self, model: ir.Model, values: Outputs | None = None) -> dict[str, np.ndarray]:
        """Outputs on ONNX Runtime as the graph stands, from those of `values` that it takes; from the feeds if None.

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
            taken = {value.name: (values or self._feeds)[value.name] for value in session.get_inputs()}
            return dict(zip(names, session.run(names, taken), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise RuntimeError(one_line(error)) from error


def _failed(name: str, model: ir.Model, failure: Exception) -> BisectionStep:
    known = isinstance(failure, SdcError | RuntimeError)
    text = one_line(failure) if known else f"{type(failure).__name__}: {one_line(failure)}"
    return BisectionStep(name, len(model.graph), float("inf"), text)


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
