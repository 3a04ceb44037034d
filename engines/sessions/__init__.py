"""Loaded engines, one module per backend; a backend is imported only when one of its engines is loaded."""

from __future__ import annotations

from sdc.engines.errors import TargetError
from sdc.engines.session import Session
from sdc.engines.sessions.source import EngineSource
from sdc.engines.targets import ONNXRUNTIME, ONNXRUNTIME_CUDA, OPENVINO, TENSORRT_RTX

__all__ = ["EngineSource", "open_session"]


def open_session(source: EngineSource, *, threads: int | None = None) -> Session:
    """Load an engine with its backend.

    Args:
        source: the engine's files and what they were built for.
        threads: CPU threads; None leaves it to the backend.

    Raises:
        BundleError: the backend cannot read the files.
        TargetError: this machine cannot run the engine.
    """
    try:
        return _open_session(source, threads)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"{source.files[0]} needs the package {error.name}, which is not installed",
            hint=f"{source.origin}; pip install 'sdc[tensorrt]' for plans, `sdc doctor` for the rest",
        ) from error


def _open_session(source: EngineSource, threads: int | None) -> Session:
    if source.backend == OPENVINO:
        from sdc.engines.sessions.openvino import OpenVinoSession

        return OpenVinoSession(source, threads=threads)
    if source.backend == ONNXRUNTIME:
        from sdc.engines.sessions.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(source, threads=threads)
    if source.backend == ONNXRUNTIME_CUDA:
        from sdc.engines.sessions.onnxruntime_cuda import OnnxRuntimeCudaSession

        return OnnxRuntimeCudaSession(source)
    if source.backend == TENSORRT_RTX:
        from sdc.engines.sessions.tensorrt import TensorRtSession

        return TensorRtSession(source)
    raise TargetError(f"this version of sdc has no backend {source.backend!r}", hint="use the version that wrote it")
