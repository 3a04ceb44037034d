"""`ort-cpu`: the graph itself, checked by loading it into ONNX Runtime."""

from __future__ import annotations

import time
from pathlib import Path

import onnxruntime

from sdc.compiler.build.built import BuiltEngine, one_line, save_onnx, staging
from sdc.compiler.component import Component
from sdc.engines.errors import ExportError

FILES = ("model.onnx", "model.onnx_data")


def build_onnxruntime(component: Component, folder: Path) -> BuiltEngine:
    """Write `model.onnx` and `model.onnx_data` (optimum's names), once ONNX Runtime has accepted them.

    Raises:
        ExportError: ONNX Runtime refuses the graph.
    """
    begin = time.perf_counter()
    with staging(folder, FILES) as temporary:
        path = temporary / FILES[0]
        save_onnx(component.model, path)
        _check(component.spec.name, path)
    return BuiltEngine(
        files=FILES,
        options={},
        built_with={"onnxruntime": onnxruntime.__version__},
        seconds=time.perf_counter() - begin,
    )


def _check(name: str, path: Path) -> None:
    """Load without optimising: types, shapes and kernels are checked, nothing is packed or folded."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise ExportError(
            f"ONNX Runtime refuses the graph of {name}: {one_line(error)}",
            hint="`sdc doctor` shows the version; report it together with the graph",
        ) from error
