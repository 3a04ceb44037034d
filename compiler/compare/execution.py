"""What a backend really executes for one call of an engine: its kernels, and the bytes that they write.

A graph's nodes are not what runs: backends fuse, fold and insert conversions of layout. ONNX Runtime tells by its
profile, OpenVINO by the execution graph of the compiled model after a call, TensorRT by its engine inspector.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdc.compiler.inspect.engine_file import most_frequent_first
from sdc.engines.errors import TargetError
from sdc.engines.sessions import EngineSource
from sdc.engines.targets import ONNXRUNTIME, ONNXRUNTIME_CUDA, OPENVINO, TENSORRT_RTX

_KERNEL_EVENT = "_kernel_time"
"""Ending of the profile's events that are a kernel's run."""

_ALIASES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""ONNX Runtime gives the results of these the memory of their input: nothing is written."""

_NO_KERNELS = frozenset({"Input", "Output", "Reshape"})
"""Layer types of OpenVINO's execution graph that compute nothing; a Reshape only renames its input's memory."""


@dataclass(frozen=True)
class Execution:
    """One call of an engine, as its backend carried it out.

    Attributes:
        kernels: executed kernels by the backend's name of their kind; most frequent first.
        written_bytes: of all results of executed kernels, the engine's outputs among them; None if not told.
        largest_bytes: of the largest of them.
    """

    kernels: Mapping[str, int]
    written_bytes: int | None
    largest_bytes: int | None

    @property
    def count(self) -> int:
        """Number of executed kernels."""
        return sum(self.kernels.values())


def execute_watched(source: EngineSource, feeds: Mapping[str, np.ndarray], threads: int | None) -> Execution:
    """Run an engine once, set up as its session sets it up, and say what was executed.

    Raises:
        TargetError: this machine cannot run the engine.
    """
    if source.backend in (ONNXRUNTIME, ONNXRUNTIME_CUDA):
        return _watch_onnxruntime(source, feeds, threads)
    if source.backend == OPENVINO:
        return _watch_openvino(source, feeds, threads)
    if source.backend == TENSORRT_RTX:
        return _inspect_tensorrt(source)
    raise TargetError(f"executed kernels of the backend {source.backend!r} cannot be counted")


def _watch_onnxruntime(source: EngineSource, feeds: Mapping[str, np.ndarray], threads: int | None) -> Execution:
    from sdc.engines.sessions.onnxruntime import open_inference_session as open_on_cpu
    from sdc.engines.sessions.onnxruntime import session_options
    from sdc.engines.sessions.onnxruntime_binding import input_dtypes, without_graph
    from sdc.engines.sessions.onnxruntime_cuda import open_inference_session as open_on_gpu

    with tempfile.TemporaryDirectory(prefix="sdc-profile-") as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        on_gpu = source.backend == ONNXRUNTIME_CUDA
        session = open_on_gpu(source, options)[0] if on_gpu else open_on_cpu(source, options)
        dtypes = input_dtypes(session)
        session.run(None, {name: feeds[name].astype(dtypes[name], copy=False) for name in dtypes}, without_graph())
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [event["args"] for event in events if event.get("name", "").endswith(_KERNEL_EVENT)]
    sizes = (int(each["output_size"]) for each in ran if each["op_name"] not in _ALIASES)
    return _execution(Counter(each["op_name"] for each in ran), sizes)


def _watch_openvino(source: EngineSource, feeds: Mapping[str, np.ndarray], threads: int | None) -> Execution:
    from sdc.engines.sessions.feeds import shapes_of
    from sdc.engines.sessions.openvino import compile_engine, engine_settings, read_engine

    engine = compile_engine(read_engine(source), source, engine_settings(source, threads), shapes_of(feeds))
    try:
        engine.model.create_infer_request().infer(dict(feeds))
        return _executed_openvino(engine.model)
    finally:
        engine.replacements.release()


def _executed_openvino(model: Any) -> Execution:
    kernels: Counter[str] = Counter()
    sizes = []
    constant: set[str] = set()
    for node in model.get_runtime_model().get_ordered_ops():
        kind = node.get_rt_info()["layerType"].astype(str)
        feeding = [port.get_source_output().get_node().get_friendly_name() for port in node.inputs()]
        # Not what was measured to take time: kernels below a microsecond count as not executed there, by chance.
        if kind == "Const" or (feeding and constant.issuperset(feeding)):
            constant.add(node.get_friendly_name())  # computed once, when the model is compiled
        elif kind not in _NO_KERNELS:
            kernels[kind] += 1
            sizes += [math.prod(port.get_shape()) * port.get_element_type().size for port in node.outputs()]
    return _execution(kernels, sizes)


def _inspect_tensorrt(source: EngineSource) -> Execution:
    import tensorrt_rtx as trt

    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(source.files[0].read_bytes())
    if engine is None:
        raise source.unrunnable("TensorRT cannot load the plan")
    described = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(described)["Layers"]
    # A plan says what its layers are only if it was built to; the name of one alone tells no kind.
    kinds = Counter(layer["LayerType"] if isinstance(layer, dict) else "layer" for layer in layers)
    return Execution(most_frequent_first(kinds), None, None)


def _execution(kernels: Counter[str], sizes: Iterable[int]) -> Execution:
    sizes = list(sizes)
    return Execution(most_frequent_first(kernels), sum(sizes), max(sizes, default=0))
