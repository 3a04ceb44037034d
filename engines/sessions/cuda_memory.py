"""Device memory and its errors, on cuda-python alone."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

from cuda.bindings import runtime as cudart

from sdc.engines.errors import TargetError


def cuda(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA runtime call (None, one value, or a tuple).

    Raises:
        TargetError: the call failed; it carries CUDA's own words.
    """
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        hint = None
        if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
            hint = "choose a smaller batch or size, or close other programs that use the GPU"
        raise TargetError(f"CUDA failed: {text.decode()} ({status.name})", hint=hint)
    return values[0] if len(values) == 1 else tuple(values) or None


class DeviceBuffer:
    """Device memory that only grows; what it held is lost when it does."""

    def __init__(self) -> None:
        self.address = 0
        self.capacity_bytes = 0

    def reserve(self, size_bytes: int) -> int:
        """Have at least `size_bytes`; returns the address, 256-byte aligned as cudaMalloc's always are."""
        if size_bytes > self.capacity_bytes:
            self.free()
            self.address = int(cuda(cudart.cudaMalloc(size_bytes)))
            self.capacity_bytes = size_bytes
        return self.address

    def free(self) -> None:
        """Give the memory back; may be called twice."""
        if self.capacity_bytes:
            address, self.address, self.capacity_bytes = self.address, 0, 0
            cuda(cudart.cudaFree(address))

    def __del__(self) -> None:
        # At the interpreter's end the driver frees everything, and CUDA may already be gone.
        if not sys.is_finalizing():
            self.free()


class Scratch:
    """The activations of all engines on one GPU: they run one after another, so the largest need is enough for all."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.buffer = DeviceBuffer()


_scratches: weakref.WeakValueDictionary[int, Scratch] = weakref.WeakValueDictionary()
_scratches_lock = threading.Lock()


def shared_scratch(device: int) -> Scratch:
    """The scratch memory of a GPU; it lives as long as a session holds it."""
    with _scratches_lock:
        scratch = _scratches.get(device)
        if scratch is None:
            scratch = _scratches[device] = Scratch()
        return scratch
