"""What can be compared: a bundle's engines for one target, or a lone ONNX file, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdc.compiler.inspect.engine_file import EngineFile
from sdc.compiler.inspect.inspect import inspect_engine
from sdc.compiler.inspect.onnx_file import inspect_onnx
from sdc.engines.bundle import Bundle, open_bundle
from sdc.engines.errors import InputError, TargetError
from sdc.engines.session import Session
from sdc.engines.sessions import EngineSource, open_session
from sdc.engines.specs import ComponentSpec, DimensionRange, TensorSpec
from sdc.engines.targets import ONNXRUNTIME, Target, runnable

LONE_COMPONENT = "model"
"""What the one component of a lone ONNX file is called."""

BATCH, SIDE = 2, 16
"""Sizes that free dimensions of a lone ONNX file are given: the first dimension of an input, and any other."""


@dataclass(frozen=True)
class Subject:
    """One side of a comparison.

    Attributes:
        path: as the user gave it.
        bundle: None for a lone ONNX file.
        target: whose engines are compared; None for a lone ONNX file.
        engines: what the files hold, by component.
        specs: interfaces, by component.
        unrunnable: why this machine cannot run them; None if it can.
    """

    path: Path
    bundle: Bundle | None
    target: Target | None
    engines: Mapping[str, EngineFile]
    specs: Mapping[str, ComponentSpec]
    unrunnable: str | None

    def describe(self) -> str:
        """One line for reports."""
        if self.bundle is None or self.target is None:
            return f"{self.path} (ONNX Runtime)"
        manifest = self.bundle.manifest
        fused = "fused" if manifest.fused else "not fused"
        return f"{self.path} ({manifest.model.name}, {manifest.precision}, {fused}, target {self.target.name})"

    def source(self, component: str) -> EngineSource:
        """The engine of a component, as another process can load it.

        Raises:
            BundleError: an engine file has changed.
        """
        spec = self.specs[component]
        if self.bundle is None or self.target is None:
            return EngineSource(spec, ONNXRUNTIME, (self.path,))
        engine = self.bundle.manifest.targets[self.target.name].engines[component]
        return EngineSource(
            spec=spec,
            backend=self.target.backend,
            files=tuple(self.bundle.file(name) for name in engine.files),
            options=engine.options,
            compute_capabilities=self.target.compute_capabilities,
        )

    def open_session(self, component: str, *, threads: int | None = None) -> Session:
        """Load the engine of a component; with None, the backend chooses how many CPU threads it takes."""
        return open_session(self.source(component), threads=threads)


def open_subject(path: Path, target: str | None) -> Subject:
    """Open a bundle or an ONNX file.

    Args:
        path: a bundle's folder or an .onnx file.
        target: of a bundle; None takes the fastest that runs here, or the first if none does.

    Raises:
        BundleError: the bundle is damaged.
        InputError: there is nothing at `path`, or it is neither.
        TargetError: the bundle has no such target.
    """
    if path.suffix == ".onnx" and not path.is_dir():
        return _open_onnx(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} cannot be compared", hint="give bundles or .onnx files")
    bundle = open_bundle(path)
    chosen = _choose_target(bundle, target)
    entry = bundle.manifest.targets[chosen.name]
    return Subject(
        path=path,
        bundle=bundle,
        target=chosen,
        engines={name: inspect_engine(bundle.file(engine.files[0])) for name, engine in entry.engines.items()},
        specs=bundle.manifest.components,
        unrunnable=runnable(chosen),
    )


def _choose_target(bundle: Bundle, name: str | None) -> Target:
    if name is not None:
        return bundle.target(name)
    try:
        return bundle.choose_target()
    except TargetError:
        if not bundle.manifest.targets:
            raise
        return bundle.target(next(iter(bundle.manifest.targets)))


def _open_onnx(path: Path) -> Subject:
    if not path.is_file():
        raise InputError(f"{path} not found", hint="give a bundle's folder or an .onnx file")
    engine = inspect_onnx(path)
    return Subject(path, None, None, {LONE_COMPONENT: engine}, {LONE_COMPONENT: lone_spec(engine)}, None)


def lone_spec(engine: EngineFile) -> ComponentSpec:
    """The interface of a lone ONNX file, with sizes to run it at."""
    dimensions: dict[str, DimensionRange] = {}
    inputs = []
    for tensor in engine.inputs:
        shape: list[int | str] = []
        for axis, size in enumerate(tensor.shape):
            symbol = f"{tensor.name}.{axis}" if size == "?" else size
            if isinstance(symbol, str):
                chosen = BATCH if axis == 0 else SIDE
                dimensions.setdefault(symbol, DimensionRange(1, chosen, 1 << 20))
            shape.append(symbol)
        inputs.append(TensorSpec(tensor.name, tensor.dtype, tuple(shape)))
    outputs = tuple(TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in engine.outputs)
    return ComponentSpec(LONE_COMPONENT, tuple(inputs), outputs, dimensions)
