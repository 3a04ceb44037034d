"""TensorRT for RTX plans, on an NVIDIA GPU."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorrt_rtx as trt
from cuda.bindings import runtime as cudart

from sdc.engines.errors import TargetError
from sdc.engines.gpu import find_gpus
from sdc.engines.session import Run
from sdc.engines.sessions.cuda_memory import DeviceBuffer, cuda, shared_scratch
from sdc.engines.sessions.feeds import HeldFeeds
from sdc.engines.sessions.source import EngineSource

log = logging.getLogger(__name__)

_TO_DEVICE = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
_TO_HOST = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost


class TensorRtSession:
    """A deserialised plan with one stream, buffers that are kept between runs, and scratch memory shared per GPU."""

    def __init__(self, source: EngineSource) -> None:
        self.spec = source.spec
        self._messages = _Messages()
        self._runtime: Any = trt.Runtime(self._messages)
        self._device, self._engine = self._deserialize(source)
        self._check_tensors(source)
        self._context: Any = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise source.unrunnable(self._messages.last_error)
        self._weight_bytes = int(self._engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))
        self._scratch = shared_scratch(self._device)
        self._buffers = {tensor.name: DeviceBuffer() for tensor in (*self.spec.inputs, *self.spec.outputs)}
        self._stream: Any = cuda(cudart.cudaStreamCreate())
        self._on_device: HeldFeeds | None = None

    def _deserialize(self, source: EngineSource) -> tuple[int, Any]:
        """The device that the plan is for, and the engine on it."""
        if source.files[0].stat().st_size == 0:
            raise source.unreadable("it is empty")
        with source.files[0].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            # The one thing that can be told of a plan without a GPU.
            if self._diagnose(plan) & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE):
                raise source.unreadable("its header is damaged")
            device = _choose_device(source)
            cuda(cudart.cudaSetDevice(device))
            diagnosis = self._diagnose(plan)
            for bit, reason in _DIAGNOSES.items():
                if diagnosis & int(bit):
                    raise source.unrunnable(reason)
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise source.unreadable(self._messages.last_error)
        return device, engine

    def _diagnose(self, plan: mmap.mmap) -> int:
        _, diagnosis = self._runtime.get_engine_validity(plan)
        return int(diagnosis)

    def _check_tensors(self, source: EngineSource) -> None:
        found = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        expected = {tensor.name for tensor in (*self.spec.inputs, *self.spec.outputs)}
        if found != expected:
            raise source.unreadable(f"expected tensors {sorted(expected)}, found {sorted(found)}")

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        return self.hold({})(feeds)

    def hold(self, feeds: Mapping[str, np.ndarray]) -> Run:
        """Run several times with the same feeds, which stay on the device; see `Session.hold`."""
        held = HeldFeeds(self.spec, feeds)

        def run(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert self._context is not None, "the session is closed"
            arrays = held.complete(others)
            if self._on_device is not held:  # the buffers and the context keep what was set last
                arrays |= held.arrays
            self._on_device = None
            results = self._execute(arrays)
            self._on_device = held
            return results

        return run

    def _execute(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copy arrays to the device and run; inputs that are not among them are as in the run before."""
        cuda(cudart.cudaSetDevice(self._device))  # CUDA's current device belongs to the thread
        for name, array in arrays.items():
            address = self._buffers[name].reserve(array.nbytes)
            self._require(self._context.set_input_shape(name, array.shape))
            self._require(self._context.set_tensor_address(name, address))
            cuda(cudart.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, _TO_DEVICE, self._stream))
        results = self._make_results()
        with self._scratch.lock:  # until the stream is done: the scratch memory is shared
            scratch_bytes = max(self._context.update_device_memory_size_for_shapes(), 1)
            self._context.set_device_memory(self._scratch.buffer.reserve(scratch_bytes), scratch_bytes)
            self._require(self._context.execute_async_v3(int(self._stream)))
            for name, array in results.items():
                address = self._buffers[name].address
                cuda(cudart.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, _TO_HOST, self._stream))
            cuda(cudart.cudaStreamSynchronize(self._stream))
        return results

    def _make_results(self) -> dict[str, np.ndarray]:
        """Host arrays for the outputs, each with device memory of its size behind it."""
        results = {}
        for tensor in self.spec.outputs:
            result = np.empty(tuple(self._context.get_tensor_shape(tensor.name)), tensor.dtype)
            address = self._buffers[tensor.name].reserve(result.nbytes)
            self._require(self._context.set_tensor_address(tensor.name, address))
            results[tensor.name] = result
        return results

    def _require(self, success: bool) -> None:
        if not success:
            raise TargetError(f"TensorRT failed to run {self.spec.name}: {self._messages.last_error}")

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights, the buffers, and the scratch memory, which other sessions share."""
        if self._context is None:
            return 0
        buffers = sum(buffer.capacity_bytes for buffer in self._buffers.values())
        return self._weight_bytes + buffers + self._scratch.buffer.capacity_bytes

    def close(self) -> None:
        """Release the engine; may be called twice."""
        if self._context is None:
            return
        cuda(cudart.cudaSetDevice(self._device))
        self._on_device = None
        self._context = self._engine = self._runtime = None  # in this order: each belongs to the next
        del self._scratch
        for buffer in self._buffers.values():
            buffer.free()
        cuda(cudart.cudaStreamDestroy(self._stream))

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Messages(trt.ILogger):  # type: ignore[misc]
    """Keeps TensorRT's last error for our own errors; the rest goes to the log."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.last_error = "TensorRT gave no reason"

    def log(self, severity: Any, message: str) -> None:
        """TensorRT calls this for every message."""
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.last_error = message
        log.debug("TensorRT: %s", message)


_DIAGNOSES = {
    trt.EngineInvalidityDiagnostics.VERSION_MISMATCH: f"this machine has TensorRT for RTX {trt.__version__}",
    trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC: "it was not built for this GPU",
    trt.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER: "the NVIDIA driver is too old for it",
    trt.EngineInvalidityDiagnostics.OLD_CUDA_RUNTIME: "the CUDA runtime is too old for it",
    trt.EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY: "the GPU has too little memory for it",
}
"""What `get_engine_validity` can find, in words."""


def _choose_device(source: EngineSource) -> int:
    """The number of the first GPU that the plan was built for."""
    gpus = find_gpus()
    if isinstance(gpus, str):
        raise source.unrunnable(gpus)
    for index, gpu in enumerate(gpus):
        if gpu.compute_capability in source.compute_capabilities:
            return index
    raise source.unrunnable(f"this machine has {', '.join(map(str, gpus))}")
