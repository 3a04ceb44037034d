"""Engines from typed components, one module per backend; precision is in the graph, builders take none."""

from __future__ import annotations

from pathlib import Path

from sdc.compiler.build.built import BuiltEngine
from sdc.compiler.component import Component
from sdc.engines.errors import TargetError
from sdc.engines.targets import ONNXRUNTIME, ONNXRUNTIME_CUDA, OPENVINO, TENSORRT_RTX, Target

__all__ = ["BuiltEngine", "build_engine"]


def build_engine(component: Component, target: Target, folder: Path) -> BuiltEngine:
    """Build the engine of one component, already lowered and typed for the target.

    The files appear in `folder` (made if need be) complete or not at all; files of the same names are replaced.

    Args:
        component: the network; it is not changed.
        target: what the engine is for.
        folder: the component's folder in the bundle.

    Raises:
        TargetError: the backend is not installed, or cannot build for the target.
        ExportError: the backend refused the graph; the error names the nodes as far as the backend does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if target.backend == OPENVINO:
            from sdc.compiler.build.openvino import build_openvino

            return build_openvino(component, folder)
        if target.backend in (ONNXRUNTIME, ONNXRUNTIME_CUDA):
            from sdc.compiler.build.onnxruntime import build_onnxruntime

            return build_onnxruntime(component, target, folder)
        if target.backend == TENSORRT_RTX:
            from sdc.compiler.build.tensorrt import build_tensorrt

            return build_tensorrt(component, target, folder)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"the target {target.name!r} needs the package {error.name}, which is not installed",
            hint="pip install 'sdc[all]', or choose another target; `sdc doctor` shows what can be built here",
        ) from error
    raise TargetError(f"this version of sdc has no builder for the backend {target.backend!r}")
