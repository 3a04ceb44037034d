"""`ort-cpu` and `ort-cuda`: the graph itself, checked by loading it into ONNX Runtime."""

from __future__ import annotations

import re
import time
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from sdc.compiler.build.built import BuiltEngine, one_line, save_onnx, staging, weight_bits_option
from sdc.compiler.component import Component
from sdc.engines.errors import ExportError
from sdc.engines.processor import WEIGHT_BITS
from sdc.engines.sessions.onnxruntime_cuda import ALLOW_TF32, CUDA_GRAPH
from sdc.engines.specs import SHALLOW
from sdc.engines.targets import ONNXRUNTIME_CUDA, Target

_KERNEL_MISSING = re.compile(r"NOT_IMPLEMENTED.*(Could not find an implementation for|Failed to find kernel for)")


def build_onnxruntime(component: Component, target: Target, folder: Path) -> BuiltEngine:
    """Write the graph and its weights, once ONNX Runtime has accepted them.

    For the CPU they are `model.onnx` and `model.onnx_data` (optimum's names), else they are named after the target.

    Raises:
        ExportError: ONNX Runtime refuses the graph.
    """
    begin = time.perf_counter()
    on_gpu = target.backend == ONNXRUNTIME_CUDA
    name = f"{target.name if on_gpu else 'model'}.onnx"
    files = (name, f"{name}_data")
    with staging(folder, files) as temporary:
        path = temporary / name
        save_onnx(component.model, path)
        _check(component, path, on_gpu=on_gpu)
    return BuiltEngine(
        files=files,
        options=_options(component) if on_gpu else {WEIGHT_BITS: 0, **weight_bits_option(component.model)},
        built_with={"onnxruntime": onnxruntime.__version__},
        seconds=time.perf_counter() - begin,
    )


def _options(component: Component) -> dict[str, bool]:
    """What the session on a GPU is told; what is not True is left out."""
    options = {ALLOW_TF32: _computes_in_float16(component), CUDA_GRAPH: component.spec.name in ("unet", SHALLOW)}
    return {name: True for name, wanted in options.items() if wanted}


def _computes_in_float16(component: Component) -> bool:
    products = {"Conv", "NhwcConv", "MatMul", "Gemm", "MultiHeadAttention"}
    nodes = (node for node in component.model.graph if node.op_type in products)
    return any(node.outputs[0].dtype == ir.DataType.FLOAT16 for node in nodes)


def _check(component: Component, path: Path, *, on_gpu: bool) -> None:
    """Load without optimising: types, shapes and kernels are checked, nothing is packed or folded.

    Operators, types and shapes are checked before kernels are looked for. Of a graph for a GPU the former alone can be
    told here: its operators need not have kernels for the CPU, those that are contributed for CUDA have none.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        if on_gpu and _KERNEL_MISSING.search(one_line(error)):
            return
        raise ExportError(
            f"ONNX Runtime refuses the graph of {component.spec.name}: {one_line(error)}",
            hint="`sdc doctor` shows the version; report it together with the graph",
        ) from error
