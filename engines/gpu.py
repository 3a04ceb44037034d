"""The NVIDIA GPUs of this machine, asked of the driver itself, without any package."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

_DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# Source: cuda.h, CUdevice_attribute.
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        compute_capability: its generation, e.g. "sm89".
        driver_cuda: the newest CUDA version that the driver runs, e.g. "13.0".
    """

    name: str
    compute_capability: str
    memory_bytes: int
    driver_cuda: str

    def __str__(self) -> str:
        return f"{self.name} ({self.compute_capability})"


@functools.cache
def find_gpus() -> tuple[Gpu, ...] | str:
    """The GPUs in the driver's order, or why there are none. Asked once per process."""
    try:
        driver = ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        return "there is no NVIDIA driver on this machine"
    status = driver.cuInit(0)
    count = ctypes.c_int(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return f"the NVIDIA driver found no usable GPU (CUDA error {status})"
    if count.value == 0:
        return "there is no NVIDIA GPU in this machine"
    return tuple(_read_gpu(driver, index) for index in range(count.value))


def _read_gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device, version, major, minor = (ctypes.c_int(0) for _ in range(4))
    name = ctypes.create_string_buffer(256)
    memory = ctypes.c_size_t(0)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    driver.cuDriverGetVersion(ctypes.byref(version))
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"sm{major.value}{minor.value}",
        memory_bytes=memory.value,
        driver_cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )
